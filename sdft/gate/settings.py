"""What the gate can be told, checked before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

OnDrop = Literal["rollback", "retry", "continue"]


def check_drops(on_drop: str | None, max_drop: float, protect: Mapping[str, float]) -> None:
    """Raise ValueError for an unknown answer, or a drop outside [0, 1]."""
    if on_drop is not None and on_drop not in get_args(OnDrop):
        raise ValueError(f"gate.on_drop must be one of {get_args(OnDrop)}, found {on_drop!r}")
    shares = {"max_drop": max_drop, **{f"protect.{name}": most for name, most in protect.items()}}
    for key, value in shares.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"gate.{key} must lie in [0, 1], found {value}")


def check_counts(every_n_steps: int, probe_limit: int, retries: int) -> None:
    """Raise ValueError for a number that is too small."""
    for key, least, number in (
        ("every_n_steps", 0, every_n_steps),
        ("probe_limit", 1, probe_limit),
        ("retries", 1, retries),
    ):
        if number < least:
            raise ValueError(f"gate.{key} must be at least {least}, found {number}")


def check_retry(on_drop: str | None, lr_factor: float, replay: float) -> None:
    """Raise ValueError for a retry that is out of range, or would change nothing."""
    if not 0.0 < lr_factor <= 1.0:
        raise ValueError(f"gate.retry_lr_factor must lie in (0, 1], found {lr_factor}")
    if not (math.isfinite(replay) and replay >= 0.0):
        raise ValueError(f"gate.retry_replay must be 0 or more, found {replay}")
    if on_drop == "retry" and lr_factor == 1.0 and replay == 0.0:
        raise ValueError(
            "gate.on_drop 'retry' would do the same again: set gate.retry_lr_factor below 1 or "
            "gate.retry_replay above 0"
        )
