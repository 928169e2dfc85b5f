"""Trains, and writes down the collective calls of each step: `step_calls.py FOLDER DEVICES`.

FOLDER holds a model; rank 0 writes `calls.json` there.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path += [str(TESTS), str(TESTS.parent / "tools")]

from conftest import make_module, make_task  # noqa: E402
from count_collectives import Counting  # noqa: E402
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402

from sdft import ContinualDataModule, SDFTModule  # noqa: E402
from sdft.callbacks import EMATeacher  # noqa: E402
from sdft.strategies import ShardedStrategy  # noqa: E402


class Calls(Callback):
    """Counts from a step's begin to its end, the optimizer and the teacher's average included."""

    def __init__(self) -> None:
        self.steps: list[list[list[Any]]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, SDFTModule)
        self.counting = Counting()
        pl_module.phases.listener = lambda phase: setattr(self.counting, "phase", phase)
        self.counting.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, idx: int
    ) -> None:
        self.counting.__exit__(None, None, None)
        sizes: Counter[Any] = self.counting.bytes
        self.steps.append([[*key, n, sizes[key]] for key, n in self.counting.calls.items()])


def main(folder: Path, devices: int) -> None:
    """Two steps."""
    calls = Calls()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=ShardedStrategy(timeout_minutes=1),
        callbacks=[EMATeacher(), calls],
        max_epochs=-1,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        log_every_n_steps=100,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
    )
    data = ContinualDataModule([make_task("a", train=8)], batch_size=4, steps=2)
    trainer.fit(make_module(folder), data)
    if trainer.global_rank == 0:
        (folder / "calls.json").write_text(json.dumps(calls.steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
