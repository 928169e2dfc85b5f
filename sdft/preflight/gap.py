"""The in-context gap: how much better the model answers with the demonstration, in pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdft.metrics import t95, wilson_interval

INTERVALS = {
    "accuracy": "Wilson's 95 % interval (Student's t where scores lie between 0 and 1)",
    "gap": "95 % interval for paired shares, Newcombe 1998, method 10 (Student's t of the "
    "differences where scores lie between 0 and 1)",
    "mean": "Student's 95 % interval of the mean over answers",
}
"""Figure → which interval stands beside it."""


@dataclass(frozen=True)
class Gap:
    """Accuracy with the demonstration minus accuracy without, on the same examples.

    Attributes:
        mean: Of the differences.
        ci95: Its interval.
        gained: Examples that score higher with the demonstration.
        lost: Examples that score lower with it.
    """

    mean: float
    ci95: tuple[float, float]
    gained: int
    lost: int

    @classmethod
    def of(cls, without: Sequence[float], with_it: Sequence[float]) -> Gap:
        """The gap of the scores of at least one example, in the same order.

        Args:
            without: Scores in [0, 1] of the answers to the bare prompts.
            with_it: Scores in [0, 1] of the answers to the prompts with the demonstration.
        """
        pairs = list(zip(without, with_it, strict=True))
        differences = [b - a for a, b in pairs]
        mean = math.fsum(differences) / len(pairs)
        return cls(
            mean,
            paired_interval(without, with_it),
            sum(difference > 0 for difference in differences),
            sum(difference < 0 for difference in differences),
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "mean": self.mean,
            "ci95": list(self.ci95),
            "gained": self.gained,
            "lost": self.lost,
        }


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of `second` minus `first`, pair by pair.

    For scores of 0 and 1 Newcombe's square-and-add interval for paired proportions (Newcombe 1998,
    Statistics in Medicine 17:2635, method 10): unlike Student's t it has a width where all pairs
    are alike. For other scores Student's t of the differences, and Newcombe's interval on the sums,
    which is never too narrow, where these do not vary or there is a single pair.
    """
    pairs = list(zip(first, second, strict=True))
    differences = [b - a for a, b in pairs]
    binary = all(score in (0, 1) for pair in pairs for score in pair)
    if binary or len(set(differences)) == 1:
        return _newcombe(pairs)
    n = len(pairs)
    mean = math.fsum(differences) / n
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    half = t95(n - 1) * math.sqrt(variance / n)
    return max(-1.0, mean - half), min(1.0, mean + half)


def _newcombe(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    n = len(pairs)
    sums = [math.fsum(scores) for scores in zip(*pairs, strict=True)]
    p, q = sums[1] / n, sums[0] / n
    (low_p, high_p), (low_q, high_q) = (wilson_interval(total, n) for total in reversed(sums))
    phi = _correlation(pairs)
    down, up = p - low_p, high_p - p
    other_up, other_down = high_q - q, q - low_q
    below = math.sqrt(max(0.0, down**2 - 2 * phi * down * other_up + other_up**2))
    above = math.sqrt(max(0.0, up**2 - 2 * phi * up * other_down + other_down**2))
    return max(-1.0, p - q - below), min(1.0, p - q + above)


def _correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """φ of the two-by-two table, towards 0 where it is positive (Newcombe's ψ)."""
    n = len(pairs)
    both = math.fsum(a * b for a, b in pairs)
    neither = math.fsum((1 - a) * (1 - b) for a, b in pairs)
    first = math.fsum(a for a, _ in pairs)
    second = math.fsum(b for _, b in pairs)
    scale = first * (n - first) * second * (n - second)
    if scale <= 0:
        return 0.0
    product = both * neither - (first - both) * (second - both)
    if product > 0:
        product = max(product - n / 2, 0.0)
    return product / math.sqrt(scale)


@dataclass(frozen=True)
class Mean:
    """A mean over answers.

    Attributes:
        mean: Of the values.
        ci95: Student's interval, cut at 0; None with one value.
        n: How many values.
    """

    mean: float
    ci95: tuple[float, float] | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of at least one value, none below 0."""
        n, mean = len(values), math.fsum(values) / len(values)
        if n == 1:
            return cls(mean, None, n)
        variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
        half = t95(n - 1) * math.sqrt(variance / n)
        return cls(mean, (max(0.0, mean - half), mean + half), n)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"mean": self.mean, "ci95": self.ci95 and list(self.ci95), "n": self.n}
