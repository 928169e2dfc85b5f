"""What has to be in place before any other callback acts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sdft.seeding import set_random_states


class Beginning(Callback):
    """The first of a run's callbacks: `StageCheckpoint` puts it there.

    Attributes:
        states: The global random generators of every process, as a checkpoint has them; restored
            once models and examples are loaded.

    Args:
        start: Called as training starts, when everything is restored.
    """

    def __init__(self, start: Callable[[Trainer, LightningModule], None]) -> None:
        self.start = start
        self.states: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a resumed run evaluates what it still owes."""
        if trainer.global_rank < len(self.states):
            set_random_states(self.states[trainer.global_rank])
        self.states = []
        self.start(trainer, pl_module)
