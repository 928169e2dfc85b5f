"""Completions that end at given texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import WORDS, make_module, sharpen
from transformers import PreTrainedModel

from sdft import SDFTModule
from sdft.rollout import Rollout, RolloutEngine, Sampling, gathered_rollout
from sdft.suites import completions
from sdft.suites.completions import Order, complete
from sdft.thinking import Thinking

PROMPTS = [[3, 9, 10], [3, 12], [4, 9, 9, 9, 15], [5, 16]]


@pytest.fixture
def module(model_dir: Path) -> SDFTModule:
    made = make_module(model_dir)
    made.configure_model()
    sharpen(made.model, 4.0)
    return made


def greedy(module: SDFTModule, tokens: int = 12) -> list[str]:
    return [one.text for one in module.respond(PROMPTS, Sampling(tokens, temperature=0.0))]


def test_without_an_end_they_are_the_greedy_responses(module: SDFTModule) -> None:
    found = complete(module, PROMPTS, Order(Sampling(12, temperature=0.0)), 3)
    assert [one.text.strip() for one in found] == greedy(module)


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_the_first_end_cuts_and_rounds_change_nothing(
    module: SDFTModule, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "FIRST", 2)
    whole = greedy(module)
    for until in (whole[0].split()[3], whole[2].split()[-1], "never"):
        found = complete(
            module, PROMPTS, Order(Sampling(12, temperature=0.0), (until,)), batch_size
        )
        for one, text in zip(found, whole, strict=True):
            assert one.text.strip() == text.partition(until)[0].strip()
            assert one.truncated == (until not in text and one.tokens == 12)


def test_of_several_ends_the_first_in_the_text_cuts(module: SDFTModule) -> None:
    module.engine = Scripted("c b a d </s>", len(PROMPTS[0]))
    order = Order(Sampling(12, temperature=0.0), ("d", "b", "a"))
    assert complete(module, PROMPTS[:1], order, 4)[0].text.strip() == "c"


def test_little_is_written_behind_an_end(
    module: SDFTModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "FIRST", 2)
    first = greedy(module)[0].split()[0]
    found = complete(module, PROMPTS[:1], Order(Sampling(100, temperature=0.0), (first,)), 4)
    assert (found[0].text.strip(), found[0].tokens) == ("", 2)


def test_draws_do_not_depend_on_their_company(module: SDFTModule) -> None:
    order = Order(Sampling(8, temperature=1.0), seed=3)
    alone = complete(module, PROMPTS[1:2], order, 1)
    assert complete(module, PROMPTS[1:2], order, 1) == alone
    other = complete(module, PROMPTS[1:2], Order(Sampling(8, temperature=1.0), seed=4), 1)
    assert other != alone


class Scripted(RolloutEngine):
    """Says the same to every prompt, and goes on where a prompt holds the first words of it."""

    def __init__(self, words: str, prompt: int) -> None:
        self.ids, self.prompt = [WORDS.index(word) for word in words.split()], prompt

    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        eos_ids: Sequence[int],
        pad_id: int,
    ) -> Rollout:
        said = [len(prompt) - self.prompt for prompt in prompts]
        words = [self.ids[start : start + sampling.max_new_tokens] for start in said]
        return gathered_rollout(words, sampling, eos_ids, pad_id, model.device)


@pytest.mark.parametrize(
    ("words", "text", "thoughts", "finished"),
    [
        ("g a b h c a d </s>", "c", 4, True),
        ("g a b h a </s>", "", 4, True),
        ("g b b b b b b b b b b b", "", 12, False),
        ("c b a </s>", "c b", 0, True),
    ],
)
def test_thoughts_are_not_cut_but_left_out(
    module: SDFTModule,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    text: str,
    thoughts: int,
    finished: bool,
) -> None:
    monkeypatch.setattr(completions, "FIRST", 2)
    module.engine = Scripted(words, len(PROMPTS[0]))
    module.thinking = Thinking(start="g", end="h")
    order = Order(Sampling(12, temperature=0.0), ("a",))
    (found,) = complete(module, PROMPTS[:1], order, 4)
    assert found.thoughts is not None
    assert (found.text.strip(), found.thoughts.tokens) == (text, thoughts)
    assert found.thoughts.finished == finished
    assert found.truncated != finished
