"""A progress bar that names stage, task and phase."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from sdft.run import task_stream
from sdft.student import StudentModule


class StageProgressBar(RichProgressBar):
    """Lightning's Rich bar, described as "stage 1/3 · task · phase"."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the phases of the step."""
        super().on_train_start(trainer, pl_module)
        if isinstance(pl_module, StudentModule):
            pl_module.phases.listener = self._show_phase

    def _show_phase(self, phase: str) -> None:
        if phase and self.progress is not None and self.train_progress_bar_id is not None:
            description = self._get_train_description(self.trainer.current_epoch)
            self.progress.update(self.train_progress_bar_id, description=description)

    def _get_train_description(self, current_epoch: int) -> str:
        module = self.trainer.lightning_module
        if not isinstance(module, StudentModule):
            return str(super()._get_train_description(current_epoch))
        data = task_stream(self.trainer)
        stages = len(data.tasks)
        stage = min(current_epoch, stages - 1)
        parts = [f"stage {stage + 1}/{stages}", data.tasks[stage].name, module.phases.current]
        return " · ".join(part for part in parts if part)
