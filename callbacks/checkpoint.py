"""Checkpoints: one per finished stage, and a last one to resume from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from sdft.callbacks.after_step import AfterStep
from sdft.run import is_dry, run_folder, task_stream
from sdft.student import StudentModule


class StageCheckpoint(AfterStep, Checkpoint):
    """Saves student, teacher, optimizer and position to `<run>/checkpoints/`.

    `stage-<number>-<task>.ckpt` is written when a stage ends, after its evaluation; `last.ckpt`
    stands for the newest state. Every file is written under a temporary name and then renamed, so
    a name never holds half a checkpoint.

    Args:
        every_n_steps: Optimizer steps between two writes of `last.ckpt`; 0 writes it only when a
            stage ends.
        stages: Keep one checkpoint per stage.

    Raises:
        ValueError: A negative cadence.
    """

    def __init__(self, every_n_steps: int = 50, stages: bool = True) -> None:
        if every_n_steps < 0:
            raise ValueError(f"checkpoint.every_n_steps must be 0 or more, found {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.stages = stages

    def after_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Write `last.ckpt` every so many optimizer steps, but not where the stage ends anyway."""
        due = self.every_n_steps > 0 and trainer.global_step % self.every_n_steps == 0
        if due and not trainer.is_last_batch:
            if isinstance(pl_module, StudentModule):
                pl_module.phases.enter("")  # writing is no part of the update
            self._save(trainer, "last.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the stage's checkpoint; `last.ckpt` becomes another name of it."""
        if not self.stages:
            self._save(trainer, "last.ckpt")
            return
        stage = trainer.current_epoch
        task = task_stream(trainer).tasks[stage]
        path = self._save(trainer, f"stage-{stage + 1}-{task.name}.ckpt")
        if path is not None and trainer.is_global_zero:
            _link(path, path.with_name("last.ckpt"))

    def _save(self, trainer: Trainer, name: str) -> Path | None:
        if is_dry(trainer):
            return None
        path = run_folder(trainer) / "checkpoints" / name
        temporary = path.with_name(f".{name}.tmp")
        trainer.save_checkpoint(temporary, weights_only=False)
        if trainer.is_global_zero:
            os.replace(temporary, path)
        return path


def _link(path: Path, alias: Path) -> None:
    """Make `alias` another name of the file, atomically."""
    temporary = alias.with_name(f".{alias.name}.tmp")
    temporary.unlink(missing_ok=True)
    os.link(path, temporary)
    os.replace(temporary, alias)
