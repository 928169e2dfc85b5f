"""Leaves the run's configuration in its folder, without secrets."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from sdft.atomic import atomic_write
from sdft.redaction import redacted_yaml


class ConfigFile(SaveConfigCallback):
    """Writes `<run>/config.yaml`: the whole configuration, `***` in place of secrets.

    The run itself uses the values that were given.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it once, before anything is loaded."""
        log_dir = trainer.log_dir  # asked of all processes: the first one's counts
        if self.already_saved or log_dir is None or not trainer.is_global_zero:
            return
        text = self.parser.dump(self.config, skip_none=False)
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(log_dir) / self.config_filename) as file:
            file.write_text(redacted_yaml(text), encoding="utf-8")
        self.already_saved = True
