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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save student and tokenizer."""
        if not self.enabled or is_dry(trainer):
            return
        assert isinstance(pl_module, StudentModule)
        weights_of_all = whole_state(pl_module.model)  # every process brings its shards
        if not trainer.is_global_zero:
            return
        folder = run_folder(trainer) / "model"
        student, lora = pl_module.model, pl_module.adapters.lora
        if lora is None:
            student.save_pretrained(folder, state_dict=weights_of_all)
        else:
            merged(student).save_pretrained(folder)
        pl_module.tokenizer.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):  # written for the owner alone
            shutil.copymode(folder / "config.json", weights)
        if self.adapters and lora is not None:
            save_adapters(student, lora, pl_module.model_name, run_folder(trainer) / "adapters")
