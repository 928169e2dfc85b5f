"""Leaves the trained student as an ordinary Hugging Face folder."""

from __future__ import annotations

import shutil

from lightning.pytorch import Callback, LightningModule, Trainer

from sdft.run import is_dry, run_folder
from sdft.student import StudentModule


class ModelExport(Callback):
    """Writes `<run>/model/`: safetensors, configuration, tokenizer and chat template.

    `AutoModelForCausalLM.from_pretrained` loads it, and so does `--model.model_name`.

    Args:
        enabled: Write it when `fit` ends.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._done = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save student and tokenizer."""
        self._save(trainer, pl_module)
        self._done = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for a run that was resumed with nothing left to train, which gets no other hook.

        It was killed between its last checkpoint and here.
        """
        if not self._done and trainer.current_epoch == trainer.max_epochs:
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled or not trainer.is_global_zero or is_dry(trainer):
            return
        assert isinstance(pl_module, StudentModule)
        folder = run_folder(trainer) / "model"
        pl_module.model.save_pretrained(folder)
        pl_module.tokenizer.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):  # written for the owner alone
            shutil.copymode(folder / "config.json", weights)
