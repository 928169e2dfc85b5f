"""Means over seeds with 95 % intervals, and differences of runs that share a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sdft.metrics import t95

_ROUNDING = 1e-12  # differences of equal scores differ by this at most
Verdict = Literal["better", "worse", "noise"]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        values: One per seed; None where undefined.
        mean: None when a value is undefined, or there is none.
        ci95: Student's t interval of the mean; None without a mean or with one seed.
        note: Why something is None, or why the interval says little.
    """

    values: tuple[float | None, ...]
    mean: float | None = None
    ci95: tuple[float, float] | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; the note only when there is one."""
        interval = None if self.ci95 is None else list(self.ci95)
        found = {"mean": self.mean, "ci95": interval, "values": list(self.values)}
        return found | ({"note": self.note} if self.note else {})


def estimate(
    values: Sequence[float | None], low: float = -math.inf, high: float = math.inf
) -> Estimate:
    """The mean of independent values, one per seed, and its interval (Student's t, n − 1).

    Args:
        values: One per seed; None where undefined.
        low: The least that the mean can be; the interval is cut there.
        high: The most that it can be.
    """
    given = tuple(values)
    if not given:
        return Estimate(given, note="no finished run")
    if any(value is None for value in given):
        undefined = sum(value is None for value in given)
        return Estimate(given, note=f"undefined in {undefined} of {len(given)} seeds")
    numbers = [value for value in given if value is not None]
    n, mean = len(numbers), math.fsum(numbers) / len(numbers)
    if n == 1:
        return Estimate(given, mean, note="one seed: no interval")
    if max(numbers) - min(numbers) < _ROUNDING:
        note = f"all {n} seeds gave the same value: the interval has no width, which says no more"
        return Estimate(given, numbers[0], (numbers[0], numbers[0]), note)
    variance = math.fsum((number - mean) ** 2 for number in numbers) / (n - 1)
    half = t95(n - 1) * math.sqrt(variance / n)
    return Estimate(given, mean, (max(low, mean - half), min(high, mean + half)))


@dataclass(frozen=True)
class Difference:
    """How far one method is above another, seed by seed.

    Attributes:
        seeds: Seeds that both finished.
        estimate: Of the differences.
        verdict: `noise` when 0 lies within the interval; None when there is no interval, or one
            without width.
    """

    seeds: tuple[int, ...]
    estimate: Estimate
    verdict: Verdict | None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        found = self.estimate.to_dict()
        return {
            "difference": found.pop("mean"),
            **found,
            "seeds": list(self.seeds),
            "n": len(self.seeds),
            "verdict": self.verdict,
        }


def paired(ours: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> Difference:
    """Ours minus theirs over the seeds that both have.

    Args:
        ours: Seed → score in [0, 1].
        theirs: The same of the other method.
    """
    seeds = tuple(seed for seed in ours if seed in theirs)
    pairs = [(ours[seed], theirs[seed]) for seed in seeds]
    values = [None if a is None or b is None else a - b for a, b in pairs]
    if not seeds:
        return Difference((), Estimate((), note="no seed that both finished"), None)
    found = estimate(values, -1.0, 1.0)
    return Difference(seeds, found, _verdict(found))


def _verdict(found: Estimate) -> Verdict | None:
    if found.ci95 is None:
        return None
    low, high = found.ci95
    if low == high != 0:
        return None  # equal differences tell nothing of how far others would be
    if low <= 0 <= high:
        return "noise"
    return "better" if low > 0 else "worse"
