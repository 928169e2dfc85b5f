"""Steps of one contender in a process of its own, one after another."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from bench_laps import Lap
from bench_models import Plan
from bench_remote import start


@dataclass(frozen=True)
class Alone:
    """What a contender did.

    Attributes:
        laps: The steps that count.
    """

    laps: list[Lap]

    @property
    def peak(self) -> int:
        """Most bytes while they ran: resident on a CPU (with the interpreter and its libraries),
        allocated on CUDA."""
        return max(lap.peak for lap in self.laps)

    @property
    def held(self) -> int:
        """Bytes between two steps: weights, gradients, optimizer states, copies."""
        return self.laps[0].held

    @property
    def above(self) -> int:
        """Bytes that a step takes for a while."""
        return max(self.peak - self.held, 0)


def run_alone(
    name: str,
    plan: Plan,
    repeats: int = 3,
    warmup: int = 1,
    lengths: Sequence[Sequence[int]] | None = None,
) -> Alone:
    """Make steps in another process.

    Args:
        name: The contender.
        plan: Model and sizes.
        repeats: Steps that count.
        warmup: Steps before them, at least 1.
        lengths: Of the completions that SFT learns, of each step that counts.

    Raises:
        RuntimeError: The process failed; with what it wrote.
    """
    if torch.cuda.is_available():  # the other process needs what this one no longer uses
        gc.collect()
        torch.cuda.empty_cache()
    warmup = max(warmup, 1)
    contender = start(name, plan, warmup + repeats + 1)
    given = [list(step) for step in lengths] if lengths else [None] * repeats
    for _ in range(warmup):
        contender.step(given[0])
    laps = [contender.step(step) for step in given]
    contender.close()
    return Alone(laps)
