"""pass@k: the chance that at least one of k sampled responses is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdft.metrics import Estimate


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate 1 − C(n−c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    It is the share of all k-subsets of the samples that hold a passing one. Computed in whole
    numbers, so that nothing is lost to rounding however many samples there are.

    Args:
        samples: n, samples drawn for one prompt.
        passed: c, how many of them passed.
        k: Size of the subset, at most n.

    Returns:
        In [0, 1].

    Raises:
        ValueError: Not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not 0 <= passed <= samples:
        raise ValueError(f"passed must lie in [0, {samples}], found {passed}")
    if not 1 <= k <= samples:
        raise ValueError(f"k must lie in [1, {samples}], found {k}")
    subsets = math.comb(samples, k)
    return (subsets - math.comb(samples - passed, k)) / subsets


@dataclass(frozen=True)
class PassAt:
    """Which pass@k are estimated, and from what.

    A sample passes when its score is 1: with a scorer that grades, only full marks count.

    Attributes:
        ks: The values of k.
        samples: Responses drawn per prompt.
        temperature: Draws them.
        limit: Examples per column; all when None.

    Raises:
        ValueError: A k below 1, twice or above the samples, or another number out of range.
    """

    ks: tuple[int, ...]
    samples: int
    temperature: float = 1.0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"retention.pass_samples must be at least 1, found {self.samples}")
        for k in self.ks:
            if k < 1:
                raise ValueError(f"retention.pass_at: k must be at least 1, found {k}")
            if self.ks.count(k) > 1:
                raise ValueError(f"retention.pass_at: {k} is there twice")
            if k > self.samples:
                raise ValueError(
                    f"retention.pass_at: k = {k} needs as many samples, found "
                    f"retention.pass_samples = {self.samples}"
                )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"retention.pass_temperature must be a finite number above 0, found "
                f"{self.temperature}"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"retention.pass_limit must be at least 1, found {self.limit}")

    def estimates(self, scores: Sequence[Sequence[float]]) -> dict[str, Estimate]:
        """pass@k over the prompts, with its interval, for each k.

        Args:
            scores: `[prompts][samples]`, at least one prompt.
        """
        passed = [sum(score >= 1 for score in drawn) for drawn in scores]
        return {
            str(k): Estimate.from_scores([pass_at_k(self.samples, c, k) for c in passed])
            for k in self.ks
        }
