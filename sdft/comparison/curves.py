"""Every column across the stages, for each method at its chosen rate: 0 is the base, 1 the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdft.comparison.results import mean_of
from sdft.comparison.summary import Standing, Summary

Series = list[float | None]
"""One value per row: the base, then each stage."""
_LEAST = 0.02  # what the best must gain over the base for 0 and 1 to mean something


@dataclass(frozen=True)
class Lines:
    """The methods' lines in one panel.

    Attributes:
        name: The column, or what was averaged.
        kind: `task` or `suite`.
        stage: The stage that trains it, from 1; None for suites.
        base: The value before training.
        best: The highest mean over seeds of any method after any stage.
        scaled: Whether 0 is the base and 1 the best; otherwise the values are as measured.
        means: Method → mean over seeds.
        seeds: Method → one series per seed.
    """

    name: str
    kind: str
    stage: int | None
    base: float | None
    best: float | None
    scaled: bool
    means: dict[str, Series]
    seeds: dict[str, list[Series]]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        names = {"column": self.name, "kind": self.kind, "stage": self.stage}
        scale = {"base": self.base, "best": self.best, "scaled": self.scaled}
        methods = {m: {"mean": self.means[m], "seeds": self.seeds[m]} for m in self.means}
        return {**names, **scale, "methods": methods}


def column_lines(summary: Summary) -> list[Lines]:
    """One panel per task, scaled to 0 = base and 1 = best, and one per suite, as measured.

    A suite is not scaled: the base is often the best there. Nor is a task on which nothing rose
    above the base.
    """
    found = []
    for place, name in enumerate([*summary.tasks, *summary.suites]):
        stage = place + 1 if place < len(summary.tasks) else None
        seeds = {
            standing.method.name: [_column(own.scores, place) for own in standing.results]
            for standing in _measured(summary)
        }
        found.append(_lines(name, stage, seeds, scaled=stage is not None))
    return found


def prior_lines(summary: Summary) -> Lines | None:
    """The mean over the suites, as measured; None without suites."""
    first = len(summary.tasks)
    seeds = {
        standing.method.name: [
            [mean_of(row[first:]) for row in own.scores] for own in standing.results
        ]
        for standing in _measured(summary)
    }
    name = "prior suites, mean score" if len(summary.suites) > 1 else "".join(summary.suites)
    return _lines(name, None, seeds, scaled=False) if summary.suites else None


def length_lines(summary: Summary) -> Lines:
    """The mean response length in tokens over all columns."""
    seeds = {
        standing.method.name: [
            [mean_of(row) for row in own.cells("mean_length")] for own in standing.results
        ]
        for standing in _measured(summary)
    }
    return _lines("response length", None, seeds, scaled=False)


def _measured(summary: Summary) -> list[Standing]:
    return [standing for standing in summary.standings if standing.results]


def _column(rows: Sequence[Series], place: int) -> Series:
    return [row[place] for row in rows]


def _lines(name: str, stage: int | None, seeds: dict[str, list[Series]], scaled: bool) -> Lines:
    means = {method: _mean(own) for method, own in seeds.items()}
    firsts = [series[0] for own in seeds.values() for series in own]
    base = mean_of(firsts)
    reached = [value for series in means.values() for value in series if value is not None]
    best = max(reached, default=None)
    scaled = scaled and base is not None and best is not None and best - base >= _LEAST
    if scaled:
        assert base is not None
        assert best is not None
        means = {method: _scale(series, base, best) for method, series in means.items()}
        seeds = {m: [_scale(series, base, best) for series in own] for m, own in seeds.items()}
    kind = "suite" if stage is None else "task"
    return Lines(name, kind, stage, base, best, scaled, means, seeds)


def _mean(series: Sequence[Series]) -> Series:
    return [mean_of(list(values)) for values in zip(*series, strict=True)]


def _scale(series: Series, base: float, best: float) -> Series:
    return [None if value is None else (value - base) / (best - base) for value in series]


def plotted(series: Series) -> list[float]:
    """For drawing: NaN leaves a gap where a value is undefined."""
    return [math.nan if value is None else value for value in series]
