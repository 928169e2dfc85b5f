"""How far a column has fallen, and whether that is more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdft.metrics import Cell
from sdft.tasks import Task

_EPSILON = 1e-9
"""Rounding is no difference."""


@dataclass(frozen=True)
class Drop:
    """A column that has fallen further than is allowed.

    Attributes:
        column: A task learnt before, or a suite.
        was: Its best score when a stage was accepted, or the base's.
        now: Its score.
        allowed: How far it may fall.
        surely: The least it has fallen, at 95 %: the lower end of the difference's interval.
    """

    column: str
    was: float
    now: float
    allowed: float
    surely: float

    def __str__(self) -> str:
        return (
            f"{self.column} fell from {self.was:.3f} to {self.now:.3f} "
            f"(allowed {self.allowed:g}; by {self.surely:.3f} or more at 95 %)"
        )


def difference_low(was: Cell, now: Cell) -> float:
    """The lower end of the 95 % interval of `was - now`, two shares of examples.

    Newcombe's hybrid of both scores' own intervals (Newcombe 1998, method 10, for independent
    samples: wider than need be, as both are of the same examples).

    Args:
        was: Has a score and an interval.
        now: The same.
    """
    assert was.score is not None
    assert now.score is not None
    low = was.ci95[0] if was.ci95 else was.score
    high = now.ci95[1] if now.ci95 else now.score
    return was.score - now.score - math.hypot(was.score - low, high - now.score)


def find_drops(
    references: Mapping[str, Cell],
    cells: Mapping[str, Cell],
    allowed: Mapping[str, float],
    certain: bool,
) -> list[Drop]:
    """The columns that fell further than is allowed.

    A column that had a score and has none any more fell to 0: what cannot be measured is not kept.

    Args:
        references: What each column is held to.
        cells: The columns now.
        allowed: By column; others are not looked at.
        certain: Count a drop only where its 95 % interval is above 0, too.
    """
    drops = []
    for column, most in allowed.items():
        was, now = references.get(column), cells.get(column)
        if was is None or was.score is None or now is None:
            continue
        measured = now if now.score is not None else Cell(0.0, now.n)
        score = float(measured.score or 0.0)
        surely = difference_low(was, measured)
        if was.score - score > most + _EPSILON and (surely > 0 or not certain):
            drops.append(Drop(column, was.score, score, most, max(surely, 0.0)))
    return drops


def best_cells(rows: Sequence[Mapping[str, Cell]]) -> dict[str, Cell]:
    """Of each column the cell with the highest score among rows; without those never scored."""
    best: dict[str, Cell] = {}
    for row in rows:
        for column, cell in row.items():
            own = best.get(column)
            if cell.score is not None and (own is None or cell.score > (own.score or 0.0)):
                best[column] = cell
    return best


def references_of(tasks: Sequence[Task], rows: Sequence[Mapping[str, Cell]]) -> dict[str, Cell]:
    """What each column is held to: a task's best since it was learnt, a suite's best of all.

    Args:
        tasks: In their order of training.
        rows: The base's row, then those of the stages so far.
    """
    learnt = {task.name: stage + 1 for stage, task in enumerate(tasks)}
    found: dict[str, Cell] = {}
    for name in rows[0]:
        found |= best_cells([{name: row[name]} for row in rows[learnt.get(name, 0) :]])
    return found
