"""Learning-rate schedule: warm-up and decay within every stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Literal, get_args

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Decay = Literal["cosine", "linear", "constant"]


class StageSchedule(LRScheduler):
    """Linear warm-up, then decay, started afresh in each stage.

    Args:
        optimizer: The optimizer whose learning rates are scaled.
        warmup_steps: Optimizer steps from 0 to the full rate, at the start of each stage.
        decay: `cosine` or `linear` down to `floor`, or `constant`.
        floor: The fraction of the full rate left at the end of a stage.

    Raises:
        ValueError: A number out of range or an unknown decay.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 10,
        decay: Decay = "cosine",
        floor: float = 0.0,
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, found {warmup_steps}")
        if not 0.0 <= floor <= 1.0:
            raise ValueError(f"floor must lie in [0, 1], found {floor}")
        if decay not in get_args(Decay):
            raise ValueError(f"decay must be one of {', '.join(get_args(Decay))}, found {decay!r}")
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.floor = floor
        self.stage_steps: list[list[int]] = []
        super().__init__(optimizer)

    def plan(self, stage_steps: Sequence[int | Sequence[int]]) -> None:
        """Set how many optimizer steps each stage takes, before the first of them.

        Args:
            stage_steps: A number per stage; a stage whose parts warm up and decay each on their
                own has one number per part.
        """
        self.stage_steps = [[s] if isinstance(s, int) else list(s) for s in stage_steps]
        self._set_rates()

    def refresh(self) -> None:
        """Set the rates of the present step anew, after a setting was changed."""
        self._set_rates()

    def _set_rates(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = self.get_lr()

    def end_stage(self, stage: int) -> None:
        """End a stage, all its parts, after the steps made so far: the next step begins the next.

        A stage whose planned steps are all made stays as it is; ending it twice changes nothing.

        Args:
            stage: Index of the stage under way. The steps alone would not tell: after a stage's
                last step the next one, too, is under way, with no step made.
        """
        made = self.last_epoch - sum(map(sum, self.stage_steps[:stage]))
        for part, total in enumerate(self.stage_steps[stage]):
            self.stage_steps[stage][part] = min(total, max(0, made))
            made -= total
        self._set_rates()

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each parameter group at the current step."""
        return [base * self._factor() for base in self.base_lrs]

    def _factor(self) -> float:
        step, total = self._place_in_stage()
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.decay == "constant" or total == 0:
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        shape = 0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1 - progress
        return self.floor + (1 - self.floor) * shape

    def _place_in_stage(self) -> tuple[int, int]:
        step = max(0, self.last_epoch)
        for total in chain.from_iterable(self.stage_steps):
            if step < total:
                return step, total
            step -= total
        return step, 0
