"""For callbacks that act after optimizer steps, whatever the gradient accumulation."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class AfterStep(Callback):
    """Calls `after_step` at the end of each batch in which the optimizer stepped."""

    _step_before = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the step, to tell batches that end in an optimizer step from accumulation."""
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act if the optimizer stepped."""
        if trainer.global_step != self._step_before:
            self.after_step(trainer, pl_module, batch)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """What to do; `trainer.global_step` counts the step just made."""
