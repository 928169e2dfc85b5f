"""On resume this run's settings count, and everything else is as the checkpoint has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, make_task
from lightning.pytorch import Trainer
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from sdft import ContinualDataModule, StudentModule
from sdft.callbacks import Retention
from sdft.schedule import StageSchedule

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., tuple[Trainer, StudentModule]]
PLAIN = partial(StageSchedule, warmup_steps=2, decay="linear")


def module(folder: Path, rates: list[float], lr: float = 0.01, **options: Any) -> StudentModule:
    class Noting(AdamW):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    kept = {key: options.pop(key) for key in ("weight_decay", "betas") if key in options}
    return make_module(
        folder,
        optimizer=lambda parameters: Noting(parameters, lr=lr, **kept),
        **{"scheduler": PLAIN, **options},
    )


def stages(run: Any) -> Path:
    return Path(run.log_dir) / "checkpoints"


def test_a_learning_rate(fit: Fit, model_dir: Path) -> None:
    """It used to be taken from the checkpoint, whatever the command line said."""
    whole: list[float] = []
    trainer, _ = fit("whole", module(model_dir, whole), make_data(steps=4))
    halved: list[float] = []
    path = stages(trainer) / "stage-1-first.ckpt"
    fit("halved", module(model_dir, halved, lr=0.005), make_data(steps=4), ckpt_path=path)
    assert halved == pytest.approx([rate / 2 for rate in whole[4:]])
    same: list[float] = []
    fit("same", module(model_dir, same), make_data(steps=4), ckpt_path=path)
    assert same == whole[4:]


def test_another_optimizer_is_refused(fit: Fit, model_dir: Path) -> None:
    trainer, _ = fit("whole", module(model_dir, []), make_data())
    other = make_module(model_dir, optimizer=lambda parameters: SGD(parameters, lr=0.5))
    with pytest.raises(ValueError, match="optimizer 'Noting', this run's is 'SGD'"):
        fit("other", other, make_data(), ckpt_path=stages(trainer) / "stage-1-first.ckpt")


def test_other_settings_of_the_optimizer(fit: Fit, model_dir: Path) -> None:
    trainer, _ = fit("whole", module(model_dir, []), make_data())
    path = stages(trainer) / "stage-1-first.ckpt"
    changed = module(model_dir, [], weight_decay=0.5, betas=(0.5, 0.6))
    resumed, _ = fit("changed", changed, make_data(), ckpt_path=path)
    (group,) = resumed.optimizers[0].param_groups
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.5, 0.6))
    state = next(iter(resumed.optimizers[0].state.values()))
    assert state["step"] == 6, "moments and their count go on"


@pytest.mark.parametrize("steps", [3, 8])
def test_steps(fit: Fit, model_dir: Path, steps: int) -> None:
    """The plan of what is still to come is made anew; in the middle of a stage, too."""
    whole: list[float] = []
    fit("whole", module(model_dir, whole), make_data(steps=steps))
    trainer, _ = fit("other", module(model_dir, []), make_data(steps=5))
    found: list[float] = []
    boundary = stages(trainer) / "stage-1-first.ckpt"
    resumed, _ = fit("at", module(model_dir, found), make_data(steps=steps), ckpt_path=boundary)
    assert found == pytest.approx(whole[steps:])
    assert resumed.global_step == 5 + steps
    assert [len(row) for row in report(resumed)["matrix"]] == [3, 3, 3]
    assert report(resumed)["stage_steps"] == [5, steps]
    half, _ = fit("half", module(model_dir, []), make_data(steps=5), max_steps=2)
    found.clear()
    middle = stages(half) / "step-2.ckpt"
    fit("in", module(model_dir, found), make_data(steps=steps), ckpt_path=middle)
    assert found == pytest.approx(whole[2:])


def test_fewer_steps_than_are_made_are_refused(fit: Fit, model_dir: Path) -> None:
    half, _ = fit("half", module(model_dir, []), make_data(steps=5), max_steps=3)
    path = stages(half) / "step-3.ckpt"
    for steps in (2, 3):
        with pytest.raises(ValueError, match="after batch 3 of stage 1, which had 5 and now has"):
            fit("in", module(model_dir, []), make_data(steps=steps), ckpt_path=path)


def test_a_schedule_s_own_settings(fit: Fit, model_dir: Path) -> None:
    whole: list[float] = []
    other = partial(StageSchedule, warmup_steps=0, decay="cosine", floor=0.5)
    fit("whole", module(model_dir, whole, scheduler=other), make_data())
    trainer, _ = fit("first", module(model_dir, []), make_data())
    found: list[float] = []
    path = stages(trainer) / "stage-1-first.ckpt"
    fit("changed", module(model_dir, found, scheduler=other), make_data(), ckpt_path=path)
    assert found == pytest.approx(whole[3:])


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (partial(StepLR, step_size=2, gamma=0.5), partial(StepLR, step_size=2, gamma=0.1), None),
        (partial(CosineAnnealingLR, T_max=6), partial(CosineAnnealingLR, T_max=6), 0.5),
    ],
)
def test_schedules_of_torch(
    fit: Fit,
    model_dir: Path,
    before: Callable[[Optimizer], LRScheduler],
    after: Callable[[Optimizer], LRScheduler],
    expected: float | None,
) -> None:
    whole: list[float] = []
    trainer, _ = fit("whole", module(model_dir, whole, scheduler=before), make_data())
    path = stages(trainer) / "stage-1-first.ckpt"
    found: list[float] = []
    changed = module(model_dir, found, lr=0.01 if expected is None else 0.005, scheduler=after)
    fit("changed", changed, make_data(), ckpt_path=path)
    if expected is None:  # the decay so far stays, the next one is the new one
        assert found == pytest.approx([whole[3], whole[3] * 0.1, whole[3] * 0.1])
    else:
        assert found == pytest.approx([rate * expected for rate in whole[3:]])


def test_a_run_that_differs_says_so(
    fit: Fit, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = fit("whole", data=make_data())
    path = stages(trainer) / "stage-1-first.ckpt"
    capsys.readouterr()
    resumed, _ = fit("same", data=make_data(), ckpt_path=path)
    assert "resumed after step 3: no settings differ from the checkpoint's\n" in (
        capsys.readouterr().out
    )
    more = [make_task("first"), make_task("second", train=9)]
    data = ContinualDataModule(more, suites=[make_task("prior")], batch_size=3, steps=3)
    slow = make_module(model_dir, optimizer=lambda parameters: AdamW(parameters, lr=0.5))
    resumed, _ = fit("other", slow, data, ckpt_path=path, accumulate_grad_batches=2)
    out = capsys.readouterr().out
    assert "4 settings differ from the checkpoint's; this run's settings count:" in out
    (line,) = (Path(resumed.log_dir) / "resumed.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["checkpoint"] == str(path)
    assert record["step"] == 3
    assert record["differences"] == {
        "trainer.accumulate_grad_batches": [1, 2],
        "data.batch_size": [4, 3],
        "examples of second": [6, 9],
        "model.optimizer.lr": [0.01, 0.5],
    }


# ---------------------------------------------------------------- other tasks


def report(trainer: Trainer) -> Any:
    return json.loads((Path(trainer.log_dir) / "retention.json").read_text())


def test_tasks_to_come_and_suites_may_change(fit: Fit) -> None:
    """The rows so far keep what they measured; a column that is new starts with the next row."""
    trainer, _ = fit("whole", data=make_data())
    before = report(trainer)["matrix"]
    data = ContinualDataModule(
        [make_task("first"), make_task("third"), make_task("second")],
        suites=[make_task("other"), make_task("prior")],
        batch_size=4,
        steps=3,
    )
    path = stages(trainer) / "stage-1-first.ckpt"
    resumed, _ = fit("changed", data=data, ckpt_path=path)
    found = report(resumed)
    assert found["tasks"] == ["first", "third", "second"]
    rows = found["matrix"]
    assert len(rows) == 4
    for old, new in zip(before[:2], rows, strict=False):
        assert [new[0], new[2], new[4]] == old
        for column in (1, 3):
            assert new[column]["score"] is None
            assert new[column]["error"] == (
                "not among the tasks and suites when this row was measured"
            )
    assert all(cell["score"] is not None for row in rows[2:] for cell in row)


def test_a_finished_run_learns_one_more_task(fit: Fit) -> None:
    trainer, first = fit("whole", data=make_data())
    longer = make_data(("first", "second", "third"))
    path = stages(trainer) / "last.ckpt"
    resumed, _ = fit("longer", data=longer, ckpt_path=path, retention=Retention())
    assert resumed.global_step == 9
    assert len(report(resumed)["matrix"]) == 4
    assert report(resumed)["matrix"][-1][2]["score"] is not None
    assert torch.isfinite(next(first.model.parameters())).all()
