"""When a signal is out of order, and what follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Action = Literal[
    "warn", "skip_step", "freeze_teacher", "reset_teacher", "lower_lr", "stop_and_save"
]
Side = Literal["above", "below", "both"]
SHARE = 0.05
"""Share of a median that the standard deviation is taken for at least."""


@dataclass(frozen=True)
class Rule:
    """When a signal is out of order, and what follows.

    Args:
        actions: What follows, all of these; every alarm is logged, and printed, in any case. None
            at all switches the rule off.
        deviations: Out of order is what lies further than this many robust standard deviations
            (1.4826 times the median absolute deviation) from the median of the last measurements;
            null: no distance is.
        ratio: Out of order is what exceeds the median of the stage's first measurements this many
            times, or falls short of it as many times; null: no ratio is.
        side: The side of these two on which it is out of order: above, below, or both.
        noise: A standard deviation, in the signal's unit, that is never called unusual: the robust
            one is taken for at least this, and for at least a twentieth of the median.
        above: Out of order is what is above this; null: nothing is.
        below: Out of order is what is below this; null: nothing is.
        patience: Measurements in a row that have to be out of order.

    Raises:
        ValueError: An unknown action or side, or a number out of range.
    """

    actions: Sequence[Action] = ("warn",)
    deviations: float | None = 8.0
    ratio: float | None = None
    side: Side = "above"
    noise: float = 0.0
    above: float | None = None
    below: float | None = None
    patience: int = 3

    def check(self, name: str) -> None:
        """Raise ValueError, with the rule's name, unless it can be followed."""
        for action in self.actions:
            if action not in get_args(Action):
                allowed = ", ".join(get_args(Action))
                raise ValueError(f"{name}.actions: found {action!r}, allowed are {allowed}")
        if self.side not in get_args(Side):
            allowed = ", ".join(get_args(Side))
            raise ValueError(f"{name}.side must be one of {allowed}, found {self.side!r}")
        if self.patience < 1:
            raise ValueError(f"{name}.patience must be at least 1, found {self.patience}")
        _check(name, "deviations", self.deviations, low=0.0)
        _check(name, "ratio", self.ratio, low=1.0)
        _check(name, "noise", self.noise, low=None)
        for key in ("above", "below"):
            value = getattr(self, key)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}.{key} must be a finite number or null, found {value}")

    def limits(self, reference: float | None, median: float, deviation: float) -> Limits:
        """Between which values the signal is in order.

        Args:
            reference: Median of the stage's first measurements; None while there are too few.
            median: Of the last measurements; NaN while there are too few.
            deviation: Their robust standard deviation.
        """
        low, high = [], []
        if self.deviations is not None and not math.isnan(median):
            width = self.deviations * max(deviation, self.noise, abs(median) * SHARE)
            high.append(Limit(median + width, f"the last median {median:.4g}"))
            low.append(Limit(median - width, f"the last median {median:.4g}"))
        if self.ratio is not None and reference is not None and reference > 0:
            high.append(Limit(max(reference * self.ratio, self._loud), _start(reference)))
            low.append(Limit(reference / self.ratio, _start(reference)))
        high, low = (
            high if self.side != "below" else [],
            low if self.side != "above" else [],
        )
        if self.above is not None:
            high.append(Limit(self.above, "a limit"))
        if self.below is not None:
            low.append(Limit(self.below, "a limit"))
        return Limits(
            max(low, key=lambda limit: limit.value, default=None),
            min(high, key=lambda limit: limit.value, default=None),
        )

    @property
    def _loud(self) -> float:
        """What noise never reaches."""
        return self.noise * (self.deviations or 1.0)


@dataclass(frozen=True)
class Limit:
    """A value that a signal should not pass.

    Attributes:
        value: In the signal's unit.
        origin: Where it comes from, in words.
    """

    value: float
    origin: str


@dataclass(frozen=True)
class Limits:
    """The lowest and the highest value that are in order; None: any is."""

    low: Limit | None
    high: Limit | None

    def broken(self, value: float) -> str | None:
        """Why the value is out of order; None where it is not."""
        if self.high is not None and value > self.high.value:
            return f"above {self.high.value:.4g} ({self.high.origin})"
        if self.low is not None and value < self.low.value:
            return f"below {self.low.value:.4g} ({self.low.origin})"
        return None


def _start(reference: float) -> str:
    return f"the stage began at {reference:.4g}"


def _check(name: str, key: str, value: float | None, low: float | None) -> None:
    if value is None:
        return
    if not math.isfinite(value) or (value < 0 if low is None else value <= low):
        bound = "0 or more" if low is None else f"above {low:g}"
        raise ValueError(f"{name}.{key} must be a finite number {bound}, found {value}")
