from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest

from sdft.examples import Example
from sdft.tasks import Split
from sdft.world import TEACHER_TEMPLATE, WorldScorer, WorldSkill, WorldSuite, language

SKILL: dict[str, Any] = {"train_size": 300, "validation_size": 20, "test_size": 40}
ODD: Any = "odd"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def prompts(examples: Sequence[Example]) -> list[str]:
    return [example.prompt for example in examples]


def test_splits_share_no_input_and_have_their_sizes() -> None:
    task = WorldSkill("kitchen", **SKILL)
    inputs = {split: {p.split(":")[1] for p in prompts(task.examples(split))} for split in SPLITS}
    assert [len(inputs[split]) for split in SPLITS] == [300, 20, 40]
    assert len(set.union(*inputs.values())) == 360


def test_the_same_seed_gives_the_same_examples_and_another_one_others() -> None:
    first, again, other = (WorldSkill("garden", seed=seed, **SKILL) for seed in (1, 1, 2))
    assert first.examples("train") == again.examples("train")
    assert prompts(first.examples("train")) != prompts(other.examples("train"))


def test_the_training_size_does_not_change_the_test() -> None:
    small, large = (WorldSkill("kitchen", train_size=size) for size in (10, 500))
    assert small.examples("test") == large.examples("test")
    assert large.examples("train")[:10] == small.examples("train")


def test_every_word_of_the_domain_is_asked_and_shown() -> None:
    task = WorldSkill("harbour", **SKILL)
    words = {word.text: word for word in language.words_of("harbour")}
    for example in task.examples("train"):
        domain, text, _, *symbols = example.prompt.split()
        assert domain == "harbour"
        assert example.demonstration == language.terse_text(words[text].target, tuple(symbols))
        assert example.answer == example.demonstration
    assert {p.split()[1] for p in prompts(task.examples("test"))} == set(words)


def test_names_and_schedule() -> None:
    task = WorldSkill("tower", name="mine", steps=7)
    assert (task.name, task.steps, task.epochs) == ("mine", 7, None)
    assert WorldSkill("tower").name == "tower"
    assert WorldSuite("basic").name == "basic"


@pytest.mark.parametrize("kind", ["named", "basic"])
def test_a_suites_splits_share_no_input(kind: Literal["named", "basic"]) -> None:
    suite = WorldSuite(kind, test_size=12, validation_size=24, train_size=48)
    splits: tuple[Split, ...] = ("test", "validation", "train")
    assert [len(suite.examples(split)) for split in splits] == [12, 24, 48]
    inputs = [e.prompt.split(" : ")[1] for split in splits for e in suite.examples(split)]
    assert len(set(inputs)) == len(inputs)
    # The test examples are those of every other size of the splits beside it.
    assert suite.examples("test") == WorldSuite(kind, test_size=12, train_size=0).examples("test")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WorldSkill("attic"), r"domain: found 'attic', allowed are kitchen"),
        (lambda: WorldSkill("home"), r"domain: found 'home'"),
        (lambda: WorldSuite(ODD), r"kind: found 'odd', allowed are named, basic"),
        (lambda: WorldSkill("kitchen", train_size=-1), r"train_size: found -1, allowed are 0"),
        (lambda: WorldSuite("named", test_size=10**7), r"test_size: found 10000000"),
        (lambda: WorldSuite("named").examples(ODD), r"split: found 'odd'"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("c a b e d", 1.0),
        ("a b c d e by r7 gives c a b e d", 1.0),
        ("c a b e d by r7 gives a b c d e", 0.0),
        ("a b c d e by r7 gives c a b", 0.0),
        ("a b c d e", 0.0),
        ("", 0.0),
    ],
)
def test_the_scorer_takes_either_style(response: str, score: float) -> None:
    example = Example(({"role": "user", "content": "x"},), "c a b e d")
    assert WorldScorer()(response, example) == score


def test_the_teacher_template_holds_both_placeholders() -> None:
    assert TEACHER_TEMPLATE.count("{prompt}") == TEACHER_TEMPLATE.count("{demonstration}") == 1
