"""Moves the teacher: an exponential moving average of the student (arXiv 2601.19897, section 3)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from sdft.callbacks.after_step import AfterStep
from sdft.run import is_logged
from sdft.student import StudentModule
from sdft.weights import squared_distance

KINDS = ("ema", "frozen", "live")


class EMATeacher(AfterStep):
    """After every optimizer step: teacher ← teacher + rate · (student − teacher).

    The average is kept and computed in fp32 whatever the student's precision. Methods without a
    teacher are left alone. The teacher itself lives in the module, so checkpoints carry it.

    Args:
        kind: `ema`; `frozen`, a teacher that stays the base; `live`, one that is the student.
        rate: Share of the student that enters at each update of an `ema` teacher, in [0, 1].
        every_n_steps: Optimizer steps between updates.

    Raises:
        ValueError: An unknown kind, a rate outside [0, 1] or a cadence below 1.
    """

    moves_teacher = True

    def __init__(
        self,
        kind: Literal["ema", "frozen", "live"] = "ema",
        rate: float = 0.01,
        every_n_steps: int = 1,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"teacher.kind must be one of {', '.join(KINDS)}, found {kind!r}")
        if not (math.isfinite(rate) and 0.0 <= rate <= 1.0):
            raise ValueError(f"teacher.rate must lie in [0, 1], found {rate}")
        if every_n_steps < 1:
            raise ValueError(f"teacher.every_n_steps must be at least 1, found {every_n_steps}")
        self.kind = kind
        self.rate = {"ema": rate, "frozen": 0.0, "live": 1.0}[kind]
        self.every_n_steps = every_n_steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the teacher in fp32, also where the trainer's precision converted the module."""
        teacher = _teacher(pl_module)
        if teacher is not None:
            teacher.float().eval().requires_grad_(False)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Update the teacher when the cadence says so."""
        teacher = _teacher(pl_module)
        if teacher is None:
            return
        assert isinstance(pl_module, StudentModule)
        if trainer.global_step % self.every_n_steps == 0 and self.rate > 0:
            update_average(teacher, pl_module.model, self.rate)
        if is_logged(trainer, trainer.global_step) and pl_module.base is not None:
            moved = teacher_moved(teacher, pl_module.model, pl_module.base)
            pl_module.log("teacher/moved", moved, batch_size=len(batch))


@torch.no_grad()
def update_average(teacher: PreTrainedModel, student: PreTrainedModel, rate: float) -> None:
    """teacher ← teacher + rate · (student − teacher), in fp32; buffers are copied.

    Args:
        teacher: fp32 parameters, changed in place.
        student: The same architecture, any precision.
        rate: In [0, 1]; 1 makes the teacher equal to the student, exactly.
    """
    averages: list[Tensor] = list(teacher.parameters())
    values = [parameter.detach().to(torch.float32) for parameter in student.parameters()]
    assert all(average.dtype == torch.float32 for average in averages)
    torch._foreach_lerp_(averages, values, rate)
    for target, source in zip(teacher.buffers(), student.buffers(), strict=True):
        target.copy_(source)


@torch.no_grad()
def teacher_moved(
    teacher: PreTrainedModel, student: PreTrainedModel, base: PreTrainedModel
) -> Tensor:
    """‖teacher − base‖ / ‖student − base‖: 0 for a teacher that stands still, 1 for a live one.

    0 where the student has not moved either.
    """
    student_moved = squared_distance(student, base)
    ratio = (squared_distance(teacher, base) / student_moved).sqrt()
    return torch.where(student_moved > 0, ratio, torch.zeros_like(ratio))


def _teacher(pl_module: LightningModule) -> PreTrainedModel | None:
    teacher = getattr(pl_module, "teacher", None)
    return teacher if isinstance(teacher, PreTrainedModel) else None
