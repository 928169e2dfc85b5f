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
from conftest import TEMPLATE, echo_examples, make_data, make_module, make_task
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdft import ContinualDataModule, Example, PythonTask, SDFTModule
from sdft.batch import Batch
from sdft.callbacks import EMATeacher, Retention
from sdft.evaluator import Evaluator

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


def report(trainer: Trainer) -> Any:
    return json.loads((Path(trainer.log_dir) / "retention.json").read_text())


def test_the_files_of_a_report(fit: Fit) -> None:
    trainer, module = fit()
    found = report(trainer)
    assert list(found) == [
        "tasks",
        "suites",
        "matrix",
        "metrics",
        "seed",
        "method",
        "stage_steps",
        "routed",
        "selection",
    ]
    assert (found["stage_steps"], found["routed"], found["selection"]) == ([3, 3], False, None)
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


# ---------------------------------------------------------------- what else is measured


def passes(trainer: Trainer) -> list[list[Any]]:
    return [[cell["pass_at"] for cell in row] for row in report(trainer)["matrix"]]


def vowel(response: str, example: Example) -> float:
    """What a random model passes now and then."""
    return float(response[:1] in "ae")


def voweled(**options: Any) -> ContinualDataModule:
    tasks = [make_task(name, scorer=vowel) for name in ("first", "second", "prior")]
    return ContinualDataModule(tasks[:2], suites=tasks[2:], batch_size=4, steps=3, **options)


def test_pass_at_k_of_the_base_and_of_the_last_stage(fit: Fit) -> None:
    settings = {"pass_at": [1, 4], "pass_samples": 8, "pass_limit": 3}
    trainer, _ = fit(data=voweled(), retention=Retention(**settings))
    base, one, two = passes(trainer)
    assert one == [None, None, None]
    for found in (*base, *two):
        assert list(found) == ["1", "4"]
        assert 0 <= found["1"]["score"] <= found["4"]["score"] <= 1
        assert found["1"]["ci95"][0] <= found["1"]["score"] <= found["1"]["ci95"][1]
        assert (24 * found["1"]["score"]) == pytest.approx(round(24 * found["1"]["score"]))
    assert len({found["1"]["score"] for found in (*base, *two)}) > 2
    events = EventAccumulator(str(trainer.log_dir)).Reload()
    assert [e.step for e in events.Scalars("pass_at_4/first")] == [0, 6]
    assert [e.step for e in events.Scalars("kl_base/first")] == [0, 3, 6]


def test_pass_at_k_of_every_stage(fit: Fit) -> None:
    trainer, _ = fit(data=voweled(), retention=Retention(pass_at=[2], pass_every_stage=True))
    assert all(list(found) == ["2"] for row in passes(trainer) for found in row)


def test_measuring_more_changes_nothing_else(fit: Fit) -> None:
    more, one = fit("more", data=voweled(), retention=Retention(pass_at=[2]))
    less, other = fit("less", data=voweled(), retention=Retention(kl_to_base=False))
    pairs = zip(one.student.parameters(), other.student.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert passes(less) == [[None] * 3] * 3
    assert {cell["kl_base"] for row in report(less)["matrix"] for cell in row} == {None}
    for ours, theirs in zip(report(more)["matrix"], report(less)["matrix"], strict=True):
        for cell, plain in zip(ours, theirs, strict=True):
            assert {**cell, "kl_base": None, "pass_at": None} == plain


def test_the_steps_that_each_stage_took(fit: Fit) -> None:
    tasks = [make_task("short", steps=2), make_task("long", epochs=2)]
    data = ContinualDataModule(tasks, batch_size=4)
    trainer, _ = fit("whole", data=data, accumulate_grad_batches=2)
    assert report(trainer)["stage_steps"] == [2, 2]

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 1:
                trainer.datamodule.end_stage()  # type: ignore[attr-defined]

    early, _ = fit("early", data=make_data(), callbacks=[Stop()])
    first, second = report(early)["stage_steps"]
    assert first < 3
    assert (second, first + second) == (3, early.global_step)


def test_the_steps_of_an_old_checkpoint_are_unknown(fit: Fit) -> None:
    trainer, _ = fit("whole")
    path = Path(trainer.log_dir) / "checkpoints" / "stage-1-first.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (key,) = (key for key in checkpoint["callbacks"] if "Retention" in key)
    state = checkpoint["callbacks"][key]
    checkpoint["callbacks"][key] = {"rows": [[plain(c) for c in row] for row in state["rows"]]}
    torch.save(checkpoint, path.with_name("old.ckpt"))
    resumed, _ = fit("resumed", ckpt_path=path.with_name("old.ckpt"))
    found = report(resumed)
    assert found["stage_steps"] == [None, None]
    ours, whole = ([cell["kl_base"] for cell in r["matrix"][2]] for r in (found, report(trainer)))
    assert ours == pytest.approx(whole, rel=1e-3), "the base's responses are drawn again"


def plain(cell: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in cell.items() if name not in ("kl_base", "pass_at")}


class Still(SDFTModule):
    """Learns nothing."""

    method = "still"
    trains = False

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return 0.0 * self.student_logits(batch, self.rollout(batch)).sum()


def test_a_method_that_trains_nothing_is_evaluated_once(
    fit: Fit, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    real = Evaluator.cell

    def cell(self: Evaluator, module: Any, task: Any, *args: Any, **options: Any) -> Any:
        asked.append(task.name)
        return real(self, module, task, *args, **options)

    monkeypatch.setattr(Evaluator, "cell", cell)
    module = Still(model_name=str(model_dir), max_new_tokens=6, teacher_template=TEMPLATE)
    trainer, _ = fit(module=module, retention=Retention(pass_at=[1], selection_split="validation"))
    base, one, two = report(trainer)["matrix"]
    assert base == one == two
    assert asked == ["first", "second", "prior"]
    assert capsys.readouterr().out.count("still trains nothing: the base's row stands") == 2
    assert set(report(trainer)["selection"]["cells"]) == {"first", "second", "prior"}


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
        ({"split": "tset"}, "retention.split must be one of"),
        ({"selection_split": "tset"}, "retention.selection_split must be one of"),
        ({"kl_limit": 0}, "retention.kl_limit must be at least 1, found 0"),
        ({"pass_at": [1, 0]}, "retention.pass_at: k must be at least 1, found 0"),
        ({"pass_at": [2, 1, 2]}, "retention.pass_at: 2 is there twice"),
        ({"pass_at": [1, 9], "pass_samples": 8}, "k = 9 .* retention.pass_samples = 8"),
        ({"pass_samples": 0}, "retention.pass_samples must be at least 1, found 0"),
        ({"pass_at": [1], "pass_temperature": 0.0}, "retention.pass_temperature must be"),
        ({"pass_at": [1], "pass_limit": 0}, "retention.pass_limit must be at least 1, found 0"),
    ],
)
def test_a_bad_value_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Retention(**options)
