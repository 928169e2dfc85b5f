"""Lower learning rates for the rest of a run, whatever schedule scales them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""What an optimizer's group may hold: the rate, and what schedules have noted there."""


def scale_rates(optimizer: Optimizer, schedules: Iterable[Any], factor: float) -> None:
    """Multiply the rates of an optimizer and what its schedules make them of.

    Both are part of a checkpoint, so a resumed run has the lower rates by itself.

    Args:
        optimizer: Its groups' rates change at once.
        schedules: Of torch's kind, those within others (`SequentialLR`) included.
        factor: Of all rates.
    """
    for group in optimizer.param_groups:
        for name in _GROUP_RATES:
            if name in group:
                group[name] = _scaled(group[name], factor)
    for schedule in schedules:
        _scale_schedule(schedule, factor)


def _scale_schedule(schedule: Any, factor: float) -> None:
    for name in ("base_lrs", "_last_lr"):
        if hasattr(schedule, name):
            setattr(schedule, name, [_scaled(rate, factor) for rate in getattr(schedule, name)])
    for inner in getattr(schedule, "_schedulers", ()):
        _scale_schedule(inner, factor)


def _scaled(rate: Any, factor: float) -> Any:
    return rate.mul_(factor) if isinstance(rate, Tensor) else rate * factor
