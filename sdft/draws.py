"""Random numbers of a rollout that do not depend on how its rows are dealt among processes.

Each process draws the numbers of all rows, from a seed that all share, and takes those of its own:
so a row's completion is the same however many processes there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Draws:
    """Whose random numbers a rollout takes.

    Attributes:
        places: Of its rows in the whole batch.
        total: Rows of the whole batch.
        seed: Shared by all processes.
    """

    places: tuple[int, ...]
    total: int
    seed: int


_CURRENT: ContextVar[Draws | None] = ContextVar("draws", default=None)


@contextmanager
def drawing(draws: Draws | None) -> Iterator[None]:
    """Rollouts inside take these numbers; torch's global generator as ever where None."""
    token = _CURRENT.set(draws)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class Uniform:
    """Uniform numbers in [0, 1), one per row at a time.

    Args:
        rows: How many rows.
        device: Where the numbers are made and stay.

    Attributes:
        values_B: The numbers drawn last, always in the same memory; zeros before.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.values_B = torch.zeros(rows, device=device)
        self._all: Tensor | None = None
        draws = _CURRENT.get()
        if draws is not None:
            assert len(draws.places) == rows, "the numbers of other rows"
            self._all = torch.zeros(draws.total, device=device)
            self._places = torch.tensor(draws.places, device=device)
            self._generator = Generator(device).manual_seed(draws.seed)

    def draw(self) -> None:
        """The next number of every row."""
        if self._all is None:
            self.values_B.uniform_()
        else:
            self._all.uniform_(generator=self._generator)
            torch.index_select(self._all, 0, self._places, out=self.values_B)
