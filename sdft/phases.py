"""Which phase of a step is running, and what each has cost."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from sdft.cost import Ledger, PhaseCost
from sdft.memory import MemoryMeter


class PhaseClock:
    """A stopwatch for phases that follow one another: entering one closes the one before.

    Attributes:
        current: The running phase, empty between phases.
        listener: Called with the name of every phase that begins.
        totals: The cost of the whole run, when somebody keeps it.
        memory: Measures the phases' memory, when somebody wants to know.
    """

    def __init__(self) -> None:
        self.current = ""
        self.listener: Callable[[str], None] | None = None
        self.totals: Ledger | None = None
        self.memory: MemoryMeter | None = None
        self._lap = Ledger()
        self._since = 0.0

    def enter(self, phase: str) -> None:
        """Close the running phase and start `phase`; an empty name only closes."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.current:
            memory = 0 if self.memory is None else self.memory.end()
            self._add(PhaseCost(seconds=now - self._since, peak_memory_bytes=memory))
        self.current, self._since = phase, now
        if phase and self.memory is not None:
            self.memory.begin()
        if self.listener is not None:
            self.listener(phase)

    def count(self, tokens: int = 0, flops: int = 0) -> None:
        """Add to the running phase; between phases nothing is counted.

        Args:
            tokens: Tokens that go through a model, without padding.
            flops: Floating-point operations of these passes.
        """
        if self.current:
            self._add(PhaseCost(tokens=tokens, flops=flops))

    def lap(self) -> Ledger:
        """The cost of the phases that closed, and what was counted, since the last lap."""
        lap, self._lap = self._lap, Ledger()
        return lap

    def _add(self, cost: PhaseCost) -> None:
        self._lap.add(self.current, cost)
        if self.totals is not None:
            self.totals.add(self.current, cost)
