"""Moves the teacher: an exponential moving average of the student (arXiv 2601.19897, section 3)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Generator, Tensor
from transformers import PreTrainedModel

from sdft.adapters import is_adapted
from sdft.callbacks.after_step import AfterStep
from sdft.flat_sharding import aligned, is_flat
from sdft.product_average import products_moved, update_products
from sdft.ranks import rank
from sdft.rounding import stochastic_round
from sdft.run import is_logged
from sdft.seeding import derive_seed, run_seed
from sdft.sharding import is_sharded, local
from sdft.student import StudentModule
from sdft.weights import convert, squared_distance

KINDS = ("ema", "frozen", "live")
STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class EMATeacher(AfterStep):
    """After every optimizer step: teacher ← teacher + rate · (student − teacher).

    The average is computed in fp32 whatever the student's precision. Methods without a teacher are
    left alone. The teacher itself lives in the module, so checkpoints carry it.

    Args:
        kind: `ema`; `frozen`, a teacher that stays the base; `live`, one that is the student.
        rate: Share of the student that enters at each update of an `ema` teacher, in [0, 1].
        every_n_steps: Optimizer steps between updates.
        storage: float32, or bfloat16 with stochastic rounding: half of the memory, and the average
            still moves, with some noise. (Plain bfloat16 would stand almost still.) A teacher over
            adapters is always float32.

    Raises:
        ValueError: An unknown kind or storage, a rate outside [0, 1] or a cadence below 1.
    """

    moves_teacher = True

    def __init__(
        self,
        kind: Literal["ema", "frozen", "live"] = "ema",
        rate: float = 0.01,
        every_n_steps: int = 1,
        storage: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"teacher.kind must be one of {', '.join(KINDS)}, found {kind!r}")
        if not (math.isfinite(rate) and 0.0 <= rate <= 1.0):
            raise ValueError(f"teacher.rate must lie in [0, 1], found {rate}")
        if every_n_steps < 1:
            raise ValueError(f"teacher.every_n_steps must be at least 1, found {every_n_steps}")
        if storage not in STORAGE:
            raise ValueError(
                f"teacher.storage must be one of {', '.join(STORAGE)}, found {storage!r}"
            )
        self.storage = STORAGE[storage]
        self.kind = kind
        self.rate = {"ema": rate, "frozen": 0.0, "live": 1.0}[kind]
        self.every_n_steps = every_n_steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the teacher as `storage` says, also where the trainer's precision converted it."""
        teacher = _teacher(pl_module)
        if teacher is not None and is_flat(teacher):
            if self.storage != torch.float32:
                raise ValueError("teacher.storage must be float32 with FSDPStrategy")
        elif teacher is not None:
            convert(teacher.eval().requires_grad_(False), torch.float32)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same once a checkpoint is restored, whatever precision that one had."""
        teacher = _teacher(pl_module)
        if teacher is not None and not is_flat(teacher):
            convert(teacher, torch.float32 if is_adapted(teacher) else self.storage)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Update the teacher when the cadence says so."""
        teacher = _teacher(pl_module)
        if teacher is None:
            return
        assert isinstance(pl_module, StudentModule)
        due = trainer.global_step % self.every_n_steps == 0 and not pl_module.holds_teacher
        if due and self.rate > 0:
            if is_adapted(teacher):
                lost = update_products(teacher, pl_module.model, self.rate)
                pl_module.log("teacher/discarded", lost, batch_size=len(batch))
            else:
                seed = derive_seed(run_seed(), "teacher", trainer.global_step)
                with aligned(pl_module.model):
                    update_average(teacher, pl_module.model, self.rate, seed)
        flat = is_flat(pl_module.model)  # its shards are not those of the base
        if is_logged(trainer, trainer.global_step) and pl_module.base is not None and not flat:
            moved = teacher_moved(teacher, pl_module.model, pl_module.base)
            pl_module.log("teacher/moved", moved, batch_size=len(batch))


@torch.no_grad()
def update_average(
    teacher: PreTrainedModel, student: PreTrainedModel, rate: float, seed: int = 0
) -> None:
    """teacher ← teacher + rate · (student − teacher), in fp32; buffers are copied.

    Args:
        teacher: fp32 or bf16 parameters, changed in place.
        student: The same architecture, any precision.
        rate: In [0, 1]; 1 makes an fp32 teacher equal to the student, exactly.
        seed: Of the stochastic rounding of bf16 parameters.
    """
    averages: list[Tensor] = [local(parameter) for parameter in teacher.parameters()]
    values = [local(parameter.detach()) for parameter in student.parameters()]
    if averages[0].dtype == torch.float32:
        torch._foreach_lerp_(averages, [value.float() for value in values], rate)
    else:
        if is_sharded(teacher):  # each shard has noise of its own
            seed = derive_seed(seed, rank())
        generator = Generator(averages[0].device).manual_seed(seed)
        for average, value in zip(averages, values, strict=True):
            exact = average.float().lerp_(value.float(), rate)
            average.copy_(stochastic_round(exact, generator))
    for target, source in zip(teacher.buffers(), student.buffers(), strict=True):
        target.copy_(source)


@torch.no_grad()
def teacher_moved(
    teacher: PreTrainedModel, student: PreTrainedModel, base: PreTrainedModel
) -> Tensor:
    """‖teacher − base‖ / ‖student − base‖: 0 for a teacher that stands still, 1 for a live one.

    0 where the student has not moved either.
    """
    if is_adapted(student):
        return products_moved(teacher, student)
    student_moved = squared_distance(student, base)
    ratio = (squared_distance(teacher, base) / student_moved).sqrt()
    return torch.where(student_moved > 0, ratio, torch.zeros_like(ratio))


def _teacher(pl_module: LightningModule) -> PreTrainedModel | None:
    teacher = getattr(pl_module, "teacher", None)
    return teacher if isinstance(teacher, PreTrainedModel) else None
