"""Which phase of a step is running, and how long each has taken."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import torch


class PhaseClock:
    """A stopwatch for phases that follow one another: entering one closes the one before.

    Attributes:
        current: The running phase, empty between phases.
        seconds: Seconds spent per phase since `lap` was last called.
        listener: Called with the name of every phase that begins.
    """

    def __init__(self) -> None:
        self.current = ""
        self.seconds: dict[str, float] = defaultdict(float)
        self.listener: Callable[[str], None] | None = None
        self._since = 0.0

    def enter(self, phase: str) -> None:
        """Close the running phase and start `phase`; an empty name only closes."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.current:
            self.seconds[self.current] += now - self._since
        self.current, self._since = phase, now
        if self.listener is not None:
            self.listener(phase)

    def lap(self) -> dict[str, float]:
        """The seconds per phase since the last lap."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds
