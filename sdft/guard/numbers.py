"""Which numbers the guard's settings may be."""

from __future__ import annotations

from collections.abc import Mapping


def check_counts(counts: Mapping[str, int], measure_every_n_steps: int) -> None:
    """Check what is counted.

    Args:
        counts: By key, `window` and `warmup` among them; at least 1 each.
        measure_every_n_steps: 0 or more.

    Raises:
        ValueError: One of them is out of range.
    """
    for key, value in counts.items():
        if value < 1:
            raise ValueError(f"guard.{key} must be at least 1, found {value}")
    if counts["warmup"] > counts["window"]:
        raise ValueError(
            f"guard.warmup must be at most guard.window, {counts['window']}, found "
            f"{counts['warmup']}"
        )
    if measure_every_n_steps < 0:
        raise ValueError(
            f"guard.measure_every_n_steps must be 0 or more, found {measure_every_n_steps}"
        )


def check_factors(lr_factor: float, min_lr_factor: float) -> None:
    """Check how learning rates are lowered.

    Raises:
        ValueError: A factor out of range.
    """
    if not 0.0 < lr_factor < 1.0:
        raise ValueError(f"guard.lr_factor must lie between 0 and 1, found {lr_factor}")
    if not 0.0 < min_lr_factor <= 1.0:
        raise ValueError(f"guard.min_lr_factor must lie in (0, 1], found {min_lr_factor}")
