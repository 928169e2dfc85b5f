"""What a comparison says: the rate of each method, its qualities over seeds, who won."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sdft.comparison.estimate import Difference, Estimate, estimate, paired
from sdft.comparison.plan import Method, Plan
from sdft.comparison.results import Result, Results, mean_of
from sdft.comparison.selection import Rate, Selection, choose_rate, rates_of, selection_of

SCORES = ("acc", "new", "prior", "mean")
"""Qualities that lie in [0, 1]."""
CHANGES = ("bwt", "fwt", "forgetting", "retention")
"""Qualities that are differences of scores."""
QUALITIES = (*SCORES, *CHANGES, "kl_base")
PAIRED = ("acc", "prior", "mean")
"""Qualities that the winner is compared by."""


@dataclass(frozen=True)
class Standing:
    """A method at its chosen rate.

    Attributes:
        method: The method.
        rates: All its rates with finished runs.
        rate: The chosen one; None when no run is finished.
        results: Its runs at that rate, one per seed.
    """

    method: Method
    rates: list[Rate]
    rate: Rate | None
    results: list[Result] = field(default_factory=list)

    @property
    def seeds(self) -> list[int]:
        """Seeds that finished at the chosen rate."""
        return [result.run.seed for result in self.results]

    def by_seed(self, quality: str) -> dict[int, float | None]:
        """Seed → quality."""
        return {result.run.seed: quality_of(result, quality) for result in self.results}

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Every quality over the seeds."""
        return {quality: estimate_of(self.results, quality) for quality in QUALITIES}

    def per_column(
        self, value: Callable[[Result], dict[str, float | None]], low: float
    ) -> dict[str, Estimate]:
        """Something from `low` to 1 that every run has per column, over the seeds."""
        found = [value(result) for result in self.results]
        names = list(found[0]) if found else []
        return {name: estimate([own[name] for own in found], low, 1.0) for name in names}

    @cached_property
    def retention_by_suite(self) -> dict[str, Estimate]:
        """Suite → its final score minus the base's."""
        return self.per_column(lambda result: result.metrics["retention"], -1.0)

    @cached_property
    def final_by_column(self) -> dict[str, Estimate]:
        """Task or suite → its final score."""
        return self.per_column(
            lambda result: dict(zip(result.columns, result.scores[-1], strict=True)), 0.0
        )

    def cost(self, unit: str) -> float | None:
        """Mean cost of training over the seeds: `seconds` or `flops`."""
        return mean_of([result.spent("training", unit) for result in self.results])


@dataclass(frozen=True)
class Pair:
    """The winner against another method by one quality."""

    winner: str
    other: str
    quality: str
    difference: Difference

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        names = {"winner": self.winner, "other": self.other, "metric": self.quality}
        return names | self.difference.to_dict()


class Summary:
    """A comparison, summed up.

    The winner is the method with the highest mean over all columns of the last row, over its seeds
    at its chosen rate; upper bounds do not compete.

    Args:
        plan: What was compared.
        results: What there is of it.
    """

    def __init__(self, plan: Plan, results: Results) -> None:
        self.plan = plan
        self.results = results
        self.selection: Selection = selection_of(results.finished)
        self.standings = [self._standing(method) for method in plan.methods]

    def _standing(self, method: Method) -> Standing:
        own = [result for result in self.results.finished if result.run.method == method]
        rates = rates_of(own, self.selection)
        chosen = choose_rate(rates)
        return Standing(method, rates, chosen, list(chosen.results) if chosen else [])

    @property
    def tasks(self) -> list[str]:
        """The tasks, in their order of training; none when no run is finished."""
        return self.results.finished[0].tasks if self.results.finished else []

    @property
    def suites(self) -> list[str]:
        """The prior suites."""
        return self.results.finished[0].suites if self.results.finished else []

    @property
    def standing(self) -> dict[str, Standing]:
        """Method's name → standing."""
        return {standing.method.name: standing for standing in self.standings}

    @property
    def ranked(self) -> list[Standing]:
        """Methods whose mean is defined, the best first."""
        defined = [s for s in self.standings if s.estimates["mean"].mean is not None]
        return sorted(defined, key=lambda s: -(s.estimates["mean"].mean or 0.0))

    @property
    def winner(self) -> Standing | None:
        """The best contestant; None when none has a finished run."""
        return next((s for s in self.ranked if not s.method.upper_bound), None)

    @cached_property
    def pairs(self) -> list[Pair]:
        """The winner against every other method that has finished runs."""
        winner = self.winner
        if winner is None:
            return []
        return [
            Pair(winner.method.name, other.method.name, quality, self._against(other, quality))
            for other in self.ranked
            if other is not winner
            for quality in PAIRED
            if self.suites or quality != "prior"
        ]

    def _against(self, other: Standing, quality: str) -> Difference:
        assert self.winner is not None
        return paired(self.winner.by_seed(quality), other.by_seed(quality))

    def cost_factor(self, standing: Standing, unit: str) -> float | None:
        """Cost of training as a multiple of the baseline's."""
        own, reference = standing.cost(unit), self.standing[self.plan.values.baseline].cost(unit)
        return None if own is None or not reference else own / reference

    @cached_property
    def base_row(self) -> dict[str, float | None]:
        """Column → the base's score: its mean over all runs, which all begin there."""
        rows = [result.scores[0] for result in self.results.finished]
        names = [*self.tasks, *self.suites]
        return {name: mean_of([row[place] for row in rows]) for place, name in enumerate(names)}


def quality_of(result: Result, quality: str) -> float | None:
    """One quality of one run; None where undefined.

    `new` is the mean over the tasks of the last row, `prior` over the suites, `mean` over all
    columns; `retention` the mean over the suites of their change against the base; `kl_base` the
    mean over the tasks' prompts of KL(base ‖ student) per token, in the last row; the others are
    those of `retention_metrics`.
    """
    columns = {"new": result.tasks, "prior": result.suites, "mean": result.columns}
    if quality in columns:
        return result.final("score", columns[quality])
    if quality == "kl_base":
        return result.final("kl_base", result.tasks)
    if quality == "retention":
        return mean_of(list(result.metrics["retention"].values()))
    value: float | None = result.metrics[quality]
    return value


def estimate_of(results: Sequence[Result], quality: str) -> Estimate:
    """A quality over runs of different seeds."""
    low, high = {
        **dict.fromkeys(SCORES, (0.0, 1.0)),
        **dict.fromkeys(CHANGES, (-1.0, 1.0)),
        "forgetting": (0.0, 1.0),
        "kl_base": (0.0, math.inf),
    }[quality]
    return estimate([quality_of(result, quality) for result in results], low, high)
