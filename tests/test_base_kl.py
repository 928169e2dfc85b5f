"""KL(base ‖ student) along the base's own responses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, make_qwen2, make_tokenizer, run_fit, sharpen

import sdft.base_kl
import sdft.states
from sdft import Example, SDFTModule
from sdft.base_kl import BaseResponses, base_responses, mean_divergence
from sdft.encoded import Encoded
from sdft.evaluator import respond_all
from sdft.report import RetentionReport

pytestmark = pytest.mark.usefixtures("no_plots")

WORDS = ["a", "b c d e", "c d", "d e f g h a", "e"]


def moved(folder: Path, seed: int = 0) -> SDFTModule:
    """A student that has left its base."""
    module = make_module(folder)
    sharpen(module.model, 5.0)
    module.prepare_copies(module.model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def encode(module: SDFTModule) -> list[Encoded]:
    examples = [Example(({"role": "user", "content": word},), "x") for word in WORDS]
    return [Encoded(e, module.encoder.student_ids(e), []) for e in examples]


def by_hand(module: SDFTModule, prompt: list[int], response: list[int]) -> float:
    """The mean over a response's tokens of Σ p (log p − log q), one sequence at a time, in fp64."""
    logits = []
    with torch.no_grad():
        for model in (module.base, module.model.eval()):
            found = model(torch.tensor([prompt + response])).logits[0]  # type: ignore[misc]
            logits.append(found[len(prompt) - 1 : -1].double().log_softmax(-1))
    module.model.train()
    base, student = logits
    return float((base.exp() * (base - student)).sum(-1).mean())


def test_it_is_the_divergence_of_each_sequence_by_itself(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = moved(model_dir)
    prompts = [item.student_ids for item in encode(module)]
    whole = base_responses(module, prompts, 2)
    responses = [response[: 2 + row] for row, response in enumerate(whole)]  # of many lengths
    assert [len(response) for response in responses] == [2, 3, 4, 5, 6]
    expected = [by_hand(module, *pair) for pair in zip(prompts, responses, strict=True)]
    assert min(expected) > 0.01
    for size in (1, 2, 10):
        found = mean_divergence(module, prompts, responses, size)
        assert found == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    monkeypatch.setattr(sdft.states, "head", lambda model: None)  # whole logits
    monkeypatch.setattr(sdft.base_kl, "LOGITS", 1)  # row by row, whatever the batch size
    assert mean_divergence(module, prompts, responses, 10) == pytest.approx(found, rel=1e-5)


def test_the_responses_are_the_bases_own_greedy_ones(model_dir: Path) -> None:
    module = moved(model_dir)
    encoded = encode(module)
    other = respond_all(module, encoded, 10)
    kept = BaseResponses(limit=4)
    kept.divergence(module, "task", encoded, 2)
    student, base = module.student, module.base
    module.student = base
    expected = [list(r.ids) for r in respond_all(module, encoded[:4], 10)]
    module.student = student
    assert kept.ids == {"task": expected}
    assert expected != [list(r.ids) for r in other[:4]]


def test_responses_that_are_kept_are_not_drawn_again(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = moved(model_dir)
    encoded = encode(module)
    first = BaseResponses(limit=64)
    value = first.divergence(module, "task", encoded, 10)
    resumed = BaseResponses(limit=64)
    resumed.load_state_dict(first.state_dict())
    monkeypatch.setattr(module, "sample", lambda *args: pytest.fail("drawn again"))
    assert resumed.divergence(module, "task", encoded, 10) == value
    assert first.divergence(module, "task", encoded, 10) == value


def test_the_base_is_at_no_distance_from_itself(model_dir: Path) -> None:
    module = make_module(model_dir)
    module.configure_model()
    assert BaseResponses(8).divergence(module, "t", encode(module), 3) == pytest.approx(0, abs=1e-6)


def test_looking_changes_no_mode(gpt2_dir: Path) -> None:
    module = make_module(gpt2_dir)
    module.configure_model()
    values = [BaseResponses(8).divergence(module, "t", encode(module), 3) for _ in range(2)]
    assert values == [pytest.approx(0, abs=1e-6)] * 2, "dropout is off while one looks"
    assert module.model.training


def test_without_a_base_or_examples_there_is_none(model_dir: Path) -> None:
    module = make_module(model_dir, track_base=False)
    module.configure_model()
    assert BaseResponses(8).divergence(module, "t", encode(module), 3) is None
    assert BaseResponses(8).divergence(moved(model_dir), "t", [], 3) is None


def test_a_student_that_is_no_number_has_none(
    model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = moved(model_dir)
    encoded, kept = encode(module), BaseResponses(8)
    kept.divergence(module, "t", encoded, 3)
    with torch.no_grad():
        next(iter(module.model.parameters())).fill_(math.nan)
    assert kept.divergence(module, "t", encoded, 3) is None
    assert "KL(base ‖ student) on 't' is nan" in caplog.text


def test_tied_and_grouped_models(tmp_path: Path) -> None:
    make_qwen2().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    module = moved(tmp_path)
    value = BaseResponses(8).divergence(module, "t", encode(module), 3)
    assert value is not None
    assert value > 0


# ---------------------------------------------------------------- in a run


def cells(trainer: Any) -> Any:
    return RetentionReport.load(trainer.log_dir).rows


def test_every_cell_of_a_run_has_it(tmp_path: Path, model_dir: Path) -> None:
    trainer, module = run_fit(tmp_path, model_dir)
    rows = cells(trainer)
    assert all(cell.kl_base == pytest.approx(0, abs=1e-6) for cell in rows[0])
    assert all(cell.kl_base > 1e-4 for row in rows[1:] for cell in row)
    data, base = trainer.datamodule, BaseResponses(64)
    again = base.divergence(module, "first", data.encoded(data.tasks[0], "test"), 64)
    assert rows[2][0].kl_base == pytest.approx(again, rel=1e-4)


def test_without_tracking_the_base_it_is_unknown(tmp_path: Path, model_dir: Path) -> None:
    trainer, _ = run_fit(
        tmp_path, model_dir, module=make_module(model_dir, track_base=False), data=make_data()
    )
    assert {cell.kl_base for row in cells(trainer) for cell in row} == {None}
