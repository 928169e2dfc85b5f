"""Leaves the trained student as an ordinary Hugging Face folder."""

from __future__ import annotations

import shutil

from lightning.pytorch import Callback, LightningModule, Trainer

from sdft.adapter_files import save_adapters
from sdft.adapters import merged
from sdft.run import is_dry, run_folder
from sdft.sharding import whole_state
from sdft.student import StudentModule


class ModelExport(Callback):
    """Writes `<run>/model/`: safetensors, configuration, tokenizer and chat template.

    `AutoModelForCausalLM.from_pretrained` loads it, and so does `--model.model_name`.

    A student with adapters is written with these merged into its weights.

    Args:
        enabled: Write it when `fit` ends.
        adapters: Write `<run>/adapters/`, too, which peft loads onto the base.
    """

    def __init__(self, enabled: bool = True, adapters: bool = False) -> None:
        self.enabled = enabled
        self.adapters = adapters
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
        if not self.enabled or is_dry(trainer):
            return
        assert isinstance(pl_module, StudentModule)
        weights_of_all = whole_state(pl_module.model)  # every process brings its shards
        if not trainer.is_global_zero:
            return
        folder = run_folder(trainer) / "model"
        student, lora = pl_module.model, pl_module.adapters.lora
        exported = student if lora is None else merged(student)
        exported.save_pretrained(folder, state_dict=weights_of_all)
        pl_module.tokenizer.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):  # written for the owner alone
            shutil.copymode(folder / "config.json", weights)
        if self.adapters and lora is not None:
            save_adapters(student, lora, pl_module.model_name, run_folder(trainer) / "adapters")
