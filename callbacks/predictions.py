"""Keeps what `predict` answers."""

from __future__ import annotations

import json
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sdft.atomic import atomic_write
from sdft.run import run_folder


class Predictions(Callback):
    """Writes `<run>/predictions.jsonl`: task, prompt, response and answer, one object per line."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect a batch's responses."""
        self._records += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them all."""
        if not trainer.is_global_zero:
            return
        path = run_folder(trainer) / "predictions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            lines = (json.dumps(record, ensure_ascii=False) for record in self._records)
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._records = []
        print(f"predictions: {path}")
