"""Cells that were measured before: found again, and never wrongly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_model, make_module, run_fit, save_model, sharpen

from sdft import Example, PythonTask, SDFTModule
from sdft.base_kl import BaseResponses
from sdft.callbacks import Retention
from sdft.cell_cache import CachedEvaluator, model_digest
from sdft.cell_cache.described import Undescribed, code_digest, described
from sdft.cell_cache.store import CellStore, Entry
from sdft.encoded import Encoded
from sdft.evaluation import Artifacts
from sdft.evaluator import Evaluator
from sdft.metrics import Cell
from sdft.pass_at import PassAt
from sdft.report import RetentionReport
from sdft.rollout import GenerateEngine
from sdft.scorers import ExactMatch, Scorer
from sdft.thinking import Thinking

WORDS = ["a", "b c d", "c d", "e"]


class Counting(Scorer):
    """Counts how often it is asked, in what no description sees."""

    asked: list[str] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, response: str, example: Example) -> float:
        self.asked.append(response)
        return self.weight * (example.answer in response.split())


@pytest.fixture
def module(model_dir: Path) -> SDFTModule:
    made = make_module(model_dir)
    made.configure_model()
    sharpen(made.model, 4.0)
    Counting.asked.clear()
    return made


def encode(module: SDFTModule, answers: str = "abce") -> list[Encoded]:
    examples = [
        Example(({"role": "user", "content": word},), answer, demonstration="d")
        for word, answer in zip(WORDS, answers, strict=True)
    ]
    return [Encoded(e, module.encoder.student_ids(e), []) for e in examples]


def evaluator(folder: Path, **options: Any) -> CachedEvaluator:
    values = {"artifacts": Artifacts(), "base": None, "pass_at": None}
    return CachedEvaluator(folder, **{**values, **options})


def score(
    folder: Path,
    module: SDFTModule,
    task: PythonTask | None = None,
    encoded: list[Encoded] | None = None,
    batch_size: int = 8,
    **options: Any,
) -> bool:
    """Whether a cell was found in the folder; it is what is measured in any case."""
    own = evaluator(folder, **options)
    task = task or PythonTask("task", scorer=Counting())
    encoded = encoded or encode(module)
    found = own.score(module, task, encoded, batch_size)
    plain = Evaluator(own.artifacts, own.base, own.pass_at)
    assert found == plain.score(module, task, encoded, batch_size)
    return own.reused == 1


def test_the_same_is_not_measured_again(module: SDFTModule, tmp_path: Path) -> None:
    task = PythonTask("task", scorer=Counting())
    first = evaluator(tmp_path).score(module, task, encode(module), 8)
    asked = len(Counting.asked)
    assert asked == 4
    again = evaluator(tmp_path)
    assert again.score(module, PythonTask("task", scorer=Counting()), encode(module), 8) == first
    assert (len(Counting.asked), again.reused) == (asked, 1)


def louder(module: SDFTModule) -> None:
    with torch.no_grad():
        next(iter(module.model.parameters()))[3, 5] += 1e-6


def longer(module: SDFTModule) -> None:
    module.greedy = type(module.greedy)(7, temperature=0.0)


def other_engine(module: SDFTModule) -> None:
    module.engine = GenerateEngine()


def thinks(module: SDFTModule) -> None:
    module.thinking = Thinking(start="a", end="b")


def other_words(module: SDFTModule) -> None:
    module.tokenizer.chat_template += " "


def other_setting(module: SDFTModule) -> None:
    module.model.config.rms_norm_eps *= 2


CHANGES = (louder, longer, other_engine, thinks, other_words, other_setting)


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_is_measured(
    module: SDFTModule, tmp_path: Path, change: Callable[[SDFTModule], None]
) -> None:
    assert not score(tmp_path, module)
    assert score(tmp_path, module)
    change(module)
    assert not score(tmp_path, module)


def test_other_thoughts_are_measured(module: SDFTModule, tmp_path: Path) -> None:
    module.thinking = Thinking(start="a", end="b")
    assert not score(tmp_path, module)
    assert score(tmp_path, module)
    module.thinking = Thinking(start="b", end="a")
    assert not score(tmp_path, module)


def test_another_question_is_measured(module: SDFTModule, tmp_path: Path) -> None:
    task, encoded = PythonTask("task", scorer=Counting()), encode(module)
    assert not score(tmp_path, module, task, encoded)
    assert score(tmp_path, module, task, encoded)
    assert not score(tmp_path, module, task, encode(module, "abcd"))
    assert not score(tmp_path, module, task, encoded[:3])
    assert not score(tmp_path, module, task, encoded[::-1])
    assert not score(tmp_path, module, PythonTask("task", scorer=Counting(0.5)), encoded)
    assert not score(tmp_path, module, PythonTask("task", scorer=ExactMatch()), encoded)
    assert not score(tmp_path, module, PythonTask("other", scorer=Counting()), encoded)
    assert not score(tmp_path, module, task, encoded, batch_size=2)
    assert not score(tmp_path, module, task, encoded, artifacts=Artifacts(["x"]))
    assert not score(tmp_path, module, task, encoded, artifacts=Artifacts(opening_words=1))
    assert score(tmp_path, module, task, encoded), "all of them beside one another"


def test_other_code_is_measured(
    module: SDFTModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(tmp_path, module)
    monkeypatch.setattr("sdft.cell_cache.facts.code_digest", lambda: "another version")
    assert not score(tmp_path, module)


def test_code_is_told_from_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_scorer.py").write_text("LIMIT = 1\n")
    before = code_digest()
    monkeypatch.syspath_prepend(tmp_path)
    __import__("own_scorer")
    with_it = code_digest()
    assert with_it != before
    assert code_digest() == with_it
    (tmp_path / "own_scorer.py").write_text("LIMIT = 2\n")
    assert code_digest() != with_it


def test_what_cannot_be_told_is_measured_every_time(
    module: SDFTModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = PythonTask("task", scorer=lambda response, example: 1.0)
    assert not score(tmp_path, module, task)
    assert not score(tmp_path, module, task)
    assert "'task' is measured every time" in caplog.text


def test_a_cell_without_a_score_is_not_kept(module: SDFTModule, tmp_path: Path) -> None:
    task = PythonTask("task", scorer=Counting(2.0))
    assert evaluator(tmp_path).score(module, task, encode(module), 8).score is None
    assert not score(tmp_path, module, task)


# ---------------------------------------------------------------- cells with everything


def cell(folder: Path, module: SDFTModule, stage: int = 0, **options: Any) -> CachedEvaluator:
    own = evaluator(folder, **options)
    task = PythonTask("task", scorer=Counting())
    found = own.cell(module, task, encode(module), 8, stage, with_pass_at=True)
    plain = Evaluator(own.artifacts, options.get("base"), own.pass_at)
    assert found == plain.cell(module, task, encode(module), 8, stage, with_pass_at=True)
    return own


def test_pass_at_k_depends_on_how_it_is_drawn(
    module: SDFTModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = PassAt((1, 2), 4)
    assert cell(tmp_path, module, pass_at=drawn).reused == 0
    assert cell(tmp_path, module, pass_at=drawn).reused == 1
    assert cell(tmp_path, module, pass_at=PassAt((1,), 4)).reused == 0
    assert cell(tmp_path, module, pass_at=PassAt((1, 2), 4, temperature=0.5)).reused == 0
    assert cell(tmp_path, module, stage=1, pass_at=drawn).reused == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "9")
    assert cell(tmp_path, module, pass_at=drawn).reused == 0
    assert cell(tmp_path, module).reused == 0


def test_the_divergence_depends_on_the_base_and_its_responses_are_kept(
    model_dir: Path, tmp_path: Path
) -> None:
    def made(base_seed: int) -> SDFTModule:
        module = make_module(model_dir)
        module.configure_model()
        module._base = [sharpen(make_model(base_seed), 4.0)]
        return module

    first = BaseResponses(3)
    module = made(0)
    evaluator_ = evaluator(tmp_path, base=first)
    task = PythonTask("task", scorer=Counting())
    found = evaluator_.cell(module, task, encode(module), 8, 0, with_pass_at=False)
    again = evaluator(tmp_path, base=BaseResponses(3))
    assert again.cell(module, task, encode(module), 8, 0, with_pass_at=False) == found
    assert again.reused == 1
    assert again.base is not None
    assert again.base.ids == first.ids != {}
    for module_, base in ((made(1), BaseResponses(3)), (module, BaseResponses(2)), (module, None)):
        other = evaluator(tmp_path, base=base)
        other.cell(module_, task, encode(module_), 8, 0, with_pass_at=False)
        assert other.reused == 0


# ---------------------------------------------------------------- the folder


ENTRY = Entry(Cell.from_scores([1.0, 0.0], mean_length=2.0), [[1, 2]])


def test_a_store_finds_what_it_keeps_and_nothing_else(tmp_path: Path) -> None:
    store = CellStore(tmp_path / "new" / "folder")
    assert store.get({"a": 1}) is None
    store.keep({"a": 1}, ENTRY)
    assert store.get({"a": 1}) == ENTRY
    assert store.get({"a": 2}) is None
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".json"]


def test_a_damaged_or_exchanged_file_is_no_entry(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    store.keep({"a": 1}, ENTRY)
    (file,) = tmp_path.rglob("*.json")
    whole = file.read_text()
    exchanged = whole.replace('"a": 1', '"a": 2')
    newer = whole.replace('"format": 1', '"format": 9')
    for text in (whole[:40], "", "[]", exchanged, newer):
        file.write_text(text)
        assert store.get({"a": 1}) is None
    file.write_text(whole)
    assert store.get({"a": 1}) == ENTRY


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    CellStore(tmp_path / "file").keep({"a": 1}, ENTRY)
    assert "cannot be written" in caplog.text


# ---------------------------------------------------------------- digests


def test_every_part_of_a_model_counts(tmp_path: Path) -> None:
    model = make_model()
    whole = model_digest(model)
    assert model_digest(make_model()) == whole
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        flat = parameter.data.view(-1)
        flat[-1] += 1e-3
        assert model_digest(model) != whole, name
        parameter.data.copy_(before)
    assert model_digest(model) == whole
    assert model_digest(make_model().bfloat16()) != whole
    again = type(model).from_pretrained(save_model(tmp_path / "model"))
    assert model_digest(again) == whole, "wherever it comes from"


def test_tied_weights_count(tmp_path: Path) -> None:
    tied, loose = make_model(tie_word_embeddings=True), make_model()
    with torch.no_grad():
        loose.get_output_embeddings().weight.copy_(loose.get_input_embeddings().weight)
    assert model_digest(tied) != model_digest(loose)


def nested() -> Callable[[], int]:
    return lambda: 1


TYPED: dict[str, Any] = {"__name__": "__typed__"}
exec("class Typed:\n    pass", TYPED)  # as at a prompt: its code is in no file
LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize("value", [nested(), object(), [[nested()]], TYPED["Typed"](), LOOP])
def test_what_says_nothing_of_itself_is_not_described(value: Any) -> None:
    with pytest.raises(Undescribed):
        described(value)


def test_descriptions_differ_where_values_do() -> None:
    values: list[Any] = [
        1, 1.0, True, "1", None, (1,), [1], {1}, {"a": 1}, {"a": 1.0}, re.compile("a"),
        re.compile("a", re.I), Path("a"), "a", ExactMatch(), ExactMatch(ignore_case=False),
        Counting(), int, len, torch.tensor([1]), torch.tensor([1.0]), torch.float32, b"a",
    ]  # fmt: skip
    found = [json.dumps(described(value)) for value in values]
    assert len(set(found)) == len(values)
    assert described({"a", "b", "c"}) == described({"c", "b", "a"})


# ---------------------------------------------------------------- runs


def test_two_runs_share_what_they_measure_alike(
    model_dir: Path, tmp_path: Path, no_plots: None
) -> None:
    def run(root: str, **options: Any) -> tuple[RetentionReport, int]:
        retention = Retention(cache=str(tmp_path / "cells"), kl_limit=2, **options)
        trainer, _ = run_fit(
            tmp_path, model_dir, root, retention=retention, data=make_data(("first",), steps=1)
        )
        assert isinstance(retention.evaluator, CachedEvaluator)
        return RetentionReport.load(str(trainer.log_dir)), retention.evaluator.reused

    plain = run_fit(
        tmp_path, model_dir, "plain", retention=Retention(kl_limit=2),
        data=make_data(("first",), steps=1),
    )[0]  # fmt: skip
    first, none = run("one")
    second, all_cells = run("two")
    assert (none, all_cells) == (0, 4)
    assert first.to_dict() == second.to_dict()
    assert first.to_dict() == RetentionReport.load(str(plain.log_dir)).to_dict()
    assert run("three", artifact_patterns=["x"])[1] == 0
