"""Where a run leaves its files."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> Path:
    """The logger's version directory, or the root directory of a run without a logger."""
    return Path(trainer.log_dir or trainer.default_root_dir)
