"""The final model on the split that settings are chosen by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import echo_examples, make_task
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from sdft import ContinualDataModule, Example, PythonTask
from sdft.callbacks import Retention

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


def checksum(response: str, example: Example) -> float:
    return sum(map(ord, response)) % 100 / 100


def stream() -> ContinualDataModule:
    """The second suite has no validation split."""
    tasks = [make_task(name, scorer=checksum) for name in ("first", "second")]
    suites = [
        make_task("prior", scorer=checksum),
        PythonTask("bare", test=echo_examples(2), scorer=checksum),
    ]
    return ContinualDataModule(tasks, suites=suites, batch_size=4, steps=3)


def chosen(**options: Any) -> Retention:
    return Retention(selection_split="validation", **options)


def report(trainer: Trainer) -> Any:
    return json.loads((Path(trainer.log_dir) / "retention.json").read_text())


def checkpoints(trainer: Trainer) -> Path:
    return Path(trainer.log_dir) / "checkpoints"


def test_the_final_model_is_asked_once_about_all_that_have_the_split(fit: Fit) -> None:
    trainer, module = fit(data=stream(), retention=chosen())
    found = report(trainer)
    assert found["selection"]["split"] == "validation"
    assert list(found["selection"]["cells"]) == ["first", "second", "prior"]
    prompts = [module.encoder.student_ids(e) for e in echo_examples(2, offset=50)]
    scores = [r.text for r in module.respond(prompts, module.greedy)]
    expected = sum(checksum(text, None) for text in scores) / 2  # type: ignore[arg-type]
    for cell in found["selection"]["cells"].values():
        assert (cell["n"], cell["score"]) == (2, pytest.approx(expected))
        assert cell["kl_base"] is cell["pass_at"] is None
    assert found["matrix"][2][3]["n"] == 2


def test_nothing_is_asked_before_the_end(fit: Fit) -> None:
    trainer, _ = fit(data=stream(), retention=chosen())
    state = torch.load(checkpoints(trainer) / "stage-1-first.ckpt", weights_only=True)
    (retention,) = (v for k, v in state["callbacks"].items() if "Retention" in k)
    assert retention["selection"] == {"split": "validation", "cells": {}}


def test_choosing_changes_nothing_else(fit: Fit) -> None:
    with_it, one = fit("with", data=stream(), retention=chosen())
    without, other = fit("without", data=stream())
    found, plain = report(with_it), report(without)
    assert plain["selection"] is None
    assert {**found, "selection": None} == plain
    pairs = zip(one.student.parameters(), other.student.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_limit_holds_there_too(fit: Fit) -> None:
    trainer, _ = fit(data=stream(), retention=chosen(limit=1))
    assert {cell["n"] for cell in report(trainer)["selection"]["cells"].values()} == {1}


# ---------------------------------------------------------------- resumed


@pytest.mark.parametrize("place", ["stage-1-first.ckpt", "step=4.ckpt", "step=6.ckpt"])
def test_a_resumed_run_asks_as_well(fit: Fit, tmp_path: Path, place: str) -> None:
    """`step=6` is the last batch of the run: its evaluation was lost."""
    saving = ModelCheckpoint(tmp_path / "steps", "{step}", save_top_k=-1, every_n_train_steps=1)
    whole, _ = fit("whole", data=stream(), retention=chosen(), callbacks=[saving])
    folder = checkpoints(whole) if place.startswith("stage") else tmp_path / "steps"
    resumed, _ = fit("resumed", data=stream(), retention=chosen(), ckpt_path=folder / place)
    assert report(resumed) == report(whole)


def test_a_finished_run_makes_up_for_it(fit: Fit) -> None:
    """The split is asked for when the run has ended."""
    whole, _ = fit("whole", data=stream(), retention=chosen())
    plain, _ = fit("plain", data=stream())
    last = checkpoints(plain) / "last.ckpt"
    resumed, _ = fit("resumed", data=stream(), retention=chosen(), ckpt_path=last)
    assert report(resumed) == report(whole)


def test_a_finished_run_that_has_it_is_not_asked_again(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = fit("whole", data=stream(), retention=chosen())
    monkeypatch.setattr("sdft.evaluator.respond_all", lambda *args: pytest.fail("asked again"))
    last = checkpoints(whole) / "last.ckpt"
    fit("resumed", data=stream(), retention=chosen(), ckpt_path=last)


def test_a_run_that_is_made_longer_asks_the_new_model(fit: Fit) -> None:
    whole, _ = fit("whole", data=stream(), retention=chosen())
    short, _ = fit("short", data=stream(), retention=chosen(), max_epochs=1)
    assert report(short)["selection"] is not None
    last = checkpoints(short) / "last.ckpt"
    longer, _ = fit("longer", data=stream(), retention=chosen(), ckpt_path=last)
    assert report(longer) == report(whole)


def test_another_split_is_asked_anew(fit: Fit) -> None:
    whole, _ = fit("whole", data=stream(), retention=chosen())
    other = Retention(selection_split="test")
    last = checkpoints(whole) / "last.ckpt"
    resumed, _ = fit("resumed", data=stream(), retention=other, ckpt_path=last)
    found = report(resumed)
    assert found["selection"]["split"] == "test"
    scores = {name: cell["score"] for name, cell in found["selection"]["cells"].items()}
    names = [*found["tasks"], *found["suites"]]
    assert scores == {n: c["score"] for n, c in zip(names, found["matrix"][2], strict=True)}
