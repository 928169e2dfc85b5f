"""Reasoning models: both prompts, thoughts in scoring, lengths and the loss."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LETTERS, make_data, make_model, make_module, run_fit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sdft import Example, PythonTask, SDFTModule
from sdft.evaluation import Artifacts, Response, score_responses, summarise
from sdft.methods import SFTModule
from sdft.metrics import Cell
from sdft.rollout import Rollout
from sdft.scorers import ExactMatch, Scorer
from sdft.thinking import Thinking, ThoughtReader, Thoughts

WORDS = ["<pad>", "</s>", "<unk>", "user", "assistant", ":", "shown", "now"]
WORDS += ["<think>", "</think>", "{", "}", *LETTERS]
ID = {word: i for i, word in enumerate(WORDS)}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% if enable_thinking is defined %}"
    "{% if enable_thinking %}<think>\n{% else %}<think> </think>\n\n{% endif %}"
    "{% endif %}{% endif %}"
)
USER = ({"role": "user", "content": "a b"},)
EXAMPLE = Example(USER, answer="c d", demonstration="c d")


def make_tokenizer(special: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    if special:
        fast.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def in_pieces() -> PreTrainedTokenizerFast:
    """A token per byte, so that a marker is several; but `>4` is one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["</s>", *alphabet, ">4"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [(">", "4")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def ids(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thinker")
    make_model(vocab_size=len(WORDS)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def module_of(folder: Path, **options: Any) -> SDFTModule:
    made = make_module(folder, **options)
    made.configure_model()
    return made


class Says(Scorer):
    """1 for whatever is said, nothing included."""

    def __call__(self, response: str, example: Example) -> float:
        return 1.0


class Together(Says):
    def score_all(self, responses: list[str], examples: list[Example]) -> list[float]:
        assert all(responses), "asked about an answer that is not there"
        return [1.0] * len(responses)

    def details(self, responses: list[str], examples: list[Example]) -> dict[str, list[float]]:
        return {"lenient": [1.0] * len(responses)}


# ---------------------------------------------------------------- taking completions apart

READINGS = [
    ("a b </s>", False, Thoughts(0, True, "", "a b")),
    ("<think> a b </think> c d </s>", False, Thoughts(4, True, "a b", "c d")),
    ("a b </think> c d </s>", True, Thoughts(3, True, "a b", "c d")),
    ("a b </think> c d </s>", False, Thoughts(3, True, "a b", "c d")),
    ("a b c", True, Thoughts(3, False, "a b c", "")),
    ("a </s>", True, Thoughts(2, False, "a", "")),
    ("<think> a b c", False, Thoughts(4, False, "a b c", "")),
    ("<think> a </think> b <think> c </think> d </s>", False, Thoughts(7, True, "a  b  c", "d")),
    ("<think> a </think> b <think> c", False, Thoughts(6, False, "a  b  c", "")),
    ("a </think> </s>", True, Thoughts(2, True, "a", "")),
]


@pytest.mark.parametrize(("text", "opened", "expected"), READINGS)
@pytest.mark.parametrize("special", [False, True])
def test_a_completion_is_taken_apart(
    text: str, opened: bool, expected: Thoughts, special: bool
) -> None:
    found = ThoughtReader(make_tokenizer(special), Thinking()).read(ids(text), opened)
    assert (found.tokens, found.finished, found.answer) == (
        expected.tokens,
        expected.finished,
        expected.answer,
    )
    assert found.text.split() == expected.text.split()


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>so é</think>4 €", False, Thoughts(20, True, "so é", "4 €")),
        ("so</think>", True, Thoughts(10, True, "so", "")),
        ("so</thin", True, Thoughts(8, False, "so</thin", "")),
    ],
)
def test_markers_may_be_several_tokens(text: str, opened: bool, expected: Thoughts) -> None:
    tokenizer = in_pieces()
    reader = ThoughtReader(tokenizer, Thinking())
    assert reader.read(tokenizer.encode(text), opened) == expected
    assert reader.opened(tokenizer.encode("answer: <think>\n\n"))
    assert not reader.opened(tokenizer.encode("<think>\n\n</think>\n\n"))
    assert not reader.opened(tokenizer.encode("say <think> and go"))


def test_other_markers() -> None:
    reader = ThoughtReader(make_tokenizer(), Thinking(start="{", end="}"))
    assert reader.read(ids("{ a } b"), False) == Thoughts(3, True, "a", "b")
    assert reader.read(ids("<think> a </think> b"), False).tokens == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scored": "thoughts"}, ["model.thinking.scored", "'thoughts'"]),
        ({"learnt": "nothing"}, ["model.thinking.learnt", "'nothing'"]),
        ({"end": "<think>"}, ["two different markers"]),
        ({"start": " "}, ["two different markers"]),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        Thinking(**options)
    assert all(word in str(error.value) for word in words)


# ---------------------------------------------------------------- both prompts


@pytest.mark.parametrize("student", [None, False, True])
@pytest.mark.parametrize("teacher", [None, False, True])
def test_each_side_thinks_or_does_not(
    thinker: Path, student: bool | None, teacher: bool | None
) -> None:
    module = make_module(thinker, thinking=Thinking(student, teacher))
    ends = {None: ":", False: "</think>", True: "<think>"}
    given = module.encoder.student_ids(EXAMPLE), module.encoder.teacher_ids(EXAMPLE)
    assert [WORDS[prompt[-1]] for prompt in given] == [ends[student], ends[teacher]]
    assert module.opens_thought == (student is True)


def test_without_the_key_nothing_changes(thinker: Path) -> None:
    plain = make_module(thinker, chat_template_kwargs={"enable_thinking": True})
    assert plain.thoughts is None
    assert not plain.opens_thought
    assert WORDS[plain.encoder.teacher_ids(EXAMPLE)[-1]] == "<think>"
    text = ids("a </think> b </s>")
    assert plain.response([1], text, False) == Response("a </think> b", 4, False, tuple(text))


def test_a_template_without_the_switch_is_refused(thinker: Path, model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"no 'enable_thinking'.*model\.thinking\.switch"):
        make_module(model_dir, thinking=Thinking(student=True)).encoder  # noqa: B018
    with pytest.raises(ValueError, match="no 'effort'"):
        make_module(thinker, thinking=Thinking(teacher="high", switch="effort")).encoder  # noqa: B018
    both = {"thinking": Thinking(True), "chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(ValueError, match="both set 'enable_thinking'"):
        make_module(thinker, **both).encoder  # noqa: B018


def test_markers_alone_need_no_template_that_thinks(model_dir: Path) -> None:
    module, plain = make_module(model_dir, thinking=Thinking()), make_module(model_dir)
    assert module.encoder.student_ids(EXAMPLE) == plain.encoder.student_ids(EXAMPLE)
    assert module.response([1], [9, 1], False).thoughts == Thoughts(0, True, "", "a")


# ---------------------------------------------------------------- scoring


def scored(module: SDFTModule, text: str, scorer: Scorer | None = None) -> tuple[str, float]:
    prompt = module.encoder.student_ids(EXAMPLE)
    response = module.response(prompt, ids(text), not text.endswith("</s>"))
    task = PythonTask("task", scorer=scorer or ExactMatch())
    return response.text, score_responses(task, [EXAMPLE], [response])[0]


def test_scorers_see_the_answer_alone(thinker: Path) -> None:
    module = make_module(thinker, thinking=Thinking(student=True))
    assert scored(module, "a b </think> c d </s>") == ("c d", 1.0)
    assert scored(module, "c d </think> a b </s>") == ("a b", 0.0)
    assert module.scored_text(ids("a b </think> c d </s>")) == "c d"


def test_scorers_see_everything_where_they_are_to(thinker: Path) -> None:
    module = make_module(thinker, thinking=Thinking(student=True, scored="everything"))
    assert scored(module, "a b </think> c d </s>") == ("a b </think> c d", 0.0)
    assert scored(module, "c d </s>") == ("c d", 1.0)
    assert module.scored_text(ids("c d </s>")) == "c d"


@pytest.mark.parametrize("scorer", [Says(), Together()])
def test_a_thought_without_an_end_scores_nothing_whatever_the_scorer(
    thinker: Path, scorer: Scorer
) -> None:
    module = make_module(thinker, thinking=Thinking(student=True))
    assert scored(module, "c d", scorer) == ("", 0.0)
    prompt = module.encoder.student_ids(EXAMPLE)
    texts = ["c d", "a </think> c d </s>", "a </think> </s>" if scorer.__class__ is Says else "c"]
    responses = [module.response(prompt, ids(text), False) for text in texts]
    cell = summarise(PythonTask("t", scorer=scorer), [EXAMPLE] * 3, responses, Artifacts())
    silent = sum(response.unanswered for response in responses)
    assert cell.score == pytest.approx(1 - silent / 3)
    assert cell.unfinished == pytest.approx(silent / 3)
    if cell.details is not None:
        assert cell.details["lenient"].score == cell.score


def test_cells_count_tokens_of_thoughts(thinker: Path) -> None:
    module = make_module(thinker, thinking=Thinking(student=True))
    prompt = module.encoder.student_ids(EXAMPLE)
    texts = ["a b </think> c d </s>", "a", "</think> c d </s>"]
    responses = [module.response(prompt, ids(text), False) for text in texts]
    cell = summarise(PythonTask("t"), [EXAMPLE] * 3, responses, Artifacts())
    assert cell.thought_length == pytest.approx((3 + 1 + 1) / 3)
    assert cell.mean_length == pytest.approx((6 + 1 + 4) / 3)
    assert Cell.from_dict(json.loads(json.dumps(cell.to_dict()))) == cell
    plain = summarise(PythonTask("t"), [EXAMPLE], [Response("c d", 3, False)], Artifacts())
    assert not {"thought_length", "unfinished"} & set(plain.to_dict())


# ---------------------------------------------------------------- the loss


def test_the_loss_leaves_thoughts_out_where_it_is_to(thinker: Path) -> None:
    rows = [ids(text) for text in ("a b </think> c d </s>", "a b c d e f", "</think> c </s>")]
    ids_BT = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    mask_BT = torch.tensor([[i < len(row) for i in range(6)] for row in rows])
    completion = Rollout(ids_BT, mask_BT, torch.tensor([False, True, False]))

    def learnt(**options: Any) -> list[list[int]]:
        module = make_module(thinker, skip_first_tokens=1, thinking=Thinking(**options))
        return [row.nonzero().flatten().tolist() for row in module.loss_mask(completion)]

    assert learnt(student=True) == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2]]
    assert learnt(student=True, learnt="answer") == [[3, 4, 5], [], [1, 2]]
    assert learnt(student=False, learnt="answer")[1] == [1, 2, 3, 4, 5], "no thought, all answer"


def test_a_method_without_a_mask_refuses_to_leave_thoughts_out(thinker: Path) -> None:
    SFTModule(model_name=str(thinker), thinking=Thinking())
    with pytest.raises(ValueError, match=r"thinking\.learnt must be 'everything'.*'sft'"):
        SFTModule(model_name=str(thinker), thinking=Thinking(learnt="answer"))


# ---------------------------------------------------------------- a run


def test_lengths_of_thoughts_are_reported_by_stage(
    thinker: Path, tmp_path: Path, no_plots: None
) -> None:
    thinking = Thinking(student=True, teacher=True, learnt="answer")
    module = make_module(thinker, thinking=thinking, skip_first_tokens=0)
    trainer, _ = run_fit(tmp_path, thinker, module=module, data=make_data(steps=2))
    folder = Path(trainer.log_dir or "")
    report = json.loads((folder / "retention.json").read_text())
    assert all("thought_length" in cell for row in report["matrix"] for cell in row)
    with open(folder / "retention.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    for row, cell in zip(rows, [c for line in report["matrix"] for c in line], strict=True):
        assert float(row["thought_length"]) == cell["thought_length"]
        assert float(row["unfinished"]) == cell["unfinished"]
    logged = trainer.logged_metrics
    assert {"train/thought_length", "train/unfinished"} <= set(logged)
