"""The retention rows of a run: when, what, and what survives."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import echo_examples, make_data, make_module, make_task
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdft import ContinualDataModule, Example, PythonTask
from sdft.callbacks import EMATeacher, Retention
from sdft.callbacks.retention import respond_all
from sdft.data import Encoded

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


def report(trainer: Trainer) -> Any:
    return json.loads((Path(trainer.log_dir) / "retention.json").read_text())


def test_the_files_of_a_report(fit: Fit) -> None:
    trainer, module = fit()
    found = report(trainer)
    assert list(found) == ["tasks", "suites", "matrix", "metrics", "seed", "method"]
    assert (found["tasks"], found["suites"]) == (["first", "second"], ["prior"])
    assert (found["seed"], found["method"]) == (7, module.method)
    for row in found["matrix"]:
        for cell in row:
            assert {"score", "n", "ci95"} <= set(cell)
            assert cell["n"] == 4
            assert 0 <= cell["ci95"][0] <= cell["score"] <= cell["ci95"][1] <= 1
    assert {"acc", "bwt", "fwt", "forgetting", "retention"} <= set(found["metrics"])
    assert set(found["metrics"]["retention"]) == {"prior"}


def test_a_row_is_written_as_soon_as_its_stage_ends(fit: Fit) -> None:
    rows: list[tuple[int, int]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            rows.append((trainer.current_epoch, len(report(trainer)["matrix"])))

    fit(callbacks=[Watch()])
    assert rows == [(0, 1)] * 3 + [(1, 2)] * 3


def test_rows_are_the_greedy_answers_of_the_student_at_that_time(fit: Fit, model_dir: Path) -> None:
    """The base row and the last row, recomputed from the weights."""

    def checksum(response: str, example: Example) -> float:
        return sum(map(ord, response)) % 100 / 100

    task = make_task("only", test=5, scorer=checksum)
    data = ContinualDataModule([task], batch_size=4, steps=8)
    trainer, trained = fit(data=data)
    base = make_module(model_dir)
    for module, row in ((base, 0), (trained, -1)):
        prompts = [module.encoder.student_ids(e) for e in task.examples("test")]
        responses = [module.respond([prompt], module.greedy)[0] for prompt in prompts]
        scores = [
            checksum(r.text, e) for r, e in zip(responses, task.examples("test"), strict=True)
        ]
        cell = report(trainer)["matrix"][row][0]
        assert cell["score"] == pytest.approx(sum(scores) / 5)
        assert cell["mean_length"] == pytest.approx(sum(r.tokens for r in responses) / 5)


def test_answers_stand_in_the_order_of_their_examples(model_dir: Path) -> None:
    module = make_module(model_dir)
    words = ["a", "b c d e", "c d", "d e f g h a", "e"]
    examples = [Example(({"role": "user", "content": word},), "x") for word in words]
    encoded = [Encoded(e, module.encoder.student_ids(e), []) for e in examples]
    alone = [module.respond([item.student_ids], module.greedy)[0] for item in encoded]
    for size in (1, 2, 3, 10):
        assert respond_all(module, encoded, size) == alone


def test_metrics_reach_the_logger(fit: Fit) -> None:
    trainer, _ = fit()
    events = EventAccumulator(str(trainer.log_dir)).Reload()
    scores = [(e.step, e.value) for e in events.Scalars("retention/prior")]
    assert [step for step, _ in scores] == [0, 3, 6]
    expected = [row[2]["score"] for row in report(trainer)["matrix"]]
    assert [value for _, value in scores] == pytest.approx(expected)
    assert [e.step for e in events.Scalars("retention/acc")] == [3, 6]


# ---------------------------------------------------------------- which examples


def run(
    tmp_path: Path, model_dir: Path, retention: Retention, data: ContinualDataModule
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        callbacks=[EMATeacher(), retention],
        max_epochs=-1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(make_module(model_dir), datamodule=data)
    return trainer


def rows_in(folder: Path) -> Any:
    return json.loads((folder / "retention.json").read_text())["matrix"]


def test_split_limit_and_what_stands_in(tmp_path: Path, model_dir: Path) -> None:
    validation_only = PythonTask("val", train=echo_examples(2), validation=echo_examples(3))
    neither = PythonTask("none", train=echo_examples(2))
    data = ContinualDataModule([make_task("first"), validation_only, neither], batch_size=2)
    run(tmp_path, model_dir, Retention(), data)
    assert [cell["n"] for cell in rows_in(tmp_path)[0]] == [4, 3, 0]
    assert "no example" in rows_in(tmp_path)[0][2]["error"]
    run(tmp_path, model_dir, Retention(limit=2), data)
    assert [cell["n"] for cell in rows_in(tmp_path)[0]] == [2, 2, 0]
    run(tmp_path, model_dir, Retention(split="validation"), data)
    assert [cell["n"] for cell in rows_in(tmp_path)[0]] == [2, 3, 0]


def test_disabled(tmp_path: Path, model_dir: Path) -> None:
    run(tmp_path, model_dir, Retention(enabled=False), make_data(("first",)))
    assert not (tmp_path / "retention.json").exists()


# ---------------------------------------------------------------- what goes wrong


def test_a_scorer_that_raises_costs_one_column(fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    def broken(response: str, example: Example) -> float:
        raise RuntimeError("no such tool")

    tasks = [make_task("good"), make_task("bad", scorer=broken)]
    with caplog.at_level(logging.WARNING):
        trainer, _ = fit(data=ContinualDataModule(tasks, batch_size=4, steps=2))
    for row in report(trainer)["matrix"]:
        assert row[0]["score"] is not None
        assert row[1]["score"] is None
        assert "'bad' raised RuntimeError: no such tool" in row[1]["error"]
        assert row[1]["mean_length"] > 0
    assert trainer.global_step == 4


def test_a_full_disk_names_the_file_and_loses_no_row(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report of the second stage cannot be written: a resumed run has all rows."""
    whole, _ = fit("whole")
    real = Path.write_text

    def full(self: Path, data: str, *args: Any, **options: Any) -> int:
        if "retention.json" in self.name and '"n"' in data and len(json.loads(data)["matrix"]) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as `write` does: no file name
        return real(self, data, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=r"No space left.*retention\.json") as error:
            fit("full")
    assert error.value.errno == errno.ENOSPC
    folder = Path(str(error.value.filename)).parent
    assert len(json.loads((folder / "retention.json").read_text())["matrix"]) == 2
    assert not list(folder.glob(".*.tmp"))
    last = folder / "checkpoints" / "last.ckpt"
    key = next(k for k in torch.load(last, weights_only=True)["callbacks"] if "Retention" in k)
    assert len(torch.load(last, weights_only=True)["callbacks"][key]["rows"]) == 2
    resumed, _ = fit("resumed", ckpt_path=last)
    assert report(resumed) == report(whole)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"limit": 0}, "retention.limit must be at least 1, found 0"),
        ({"artifact_patterns": ["["]}, "is no regex"),
        ({"split": "tset"}, "retention.split"),
    ],
)
def test_a_bad_value_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Retention(**options)
