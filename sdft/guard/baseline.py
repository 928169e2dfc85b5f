"""What was normal so far: a median and a robust deviation over a window."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

MAD_TO_SIGMA = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""


class Baseline:
    """The last measurements of one signal in a stage, and the first ones.

    Args:
        window: How many of the last count.
        needed: How many there must be before they tell anything.
        first: How many of the first make the stage's reference.
    """

    def __init__(self, window: int, needed: int, first: int) -> None:
        self.needed, self.first = needed, first
        self._last: deque[float] = deque(maxlen=window)
        self._first: list[float] = []

    def add(self, value: float) -> None:
        """Take a measurement that was in order."""
        self._last.append(value)
        if len(self._first) < self.first:
            self._first.append(value)

    def clear(self) -> None:
        """Forget the stage."""
        self._last.clear()
        self._first.clear()

    def forget_last(self) -> None:
        """Forget what was normal, but not how the stage began."""
        self._last.clear()

    @property
    def reference(self) -> float | None:
        """Median of the stage's first measurements; None while there are too few."""
        return median(self._first) if len(self._first) == self.first else None

    def spread(self) -> tuple[float, float]:
        """Median and robust standard deviation of the last; NaN while there are too few."""
        if len(self._last) < self.needed:
            return math.nan, math.nan
        middle = median(self._last)
        return middle, MAD_TO_SIGMA * median(abs(value - middle) for value in self._last)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"last": list(self._last), "first": list(self._first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self._last.clear()
        self._last.extend(state["last"])
        self._first = list(state["first"])
