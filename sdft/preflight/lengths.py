"""How long answers are, and how many of them the length limit ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens.

    Attributes:
        n: How many there are.
        mean: Their mean.
        p10: A tenth of them is at most so long; the others alike.
        p50: The median.
        p90: See `p10`.
        longest: The longest.
        truncated: Share that the limit ended, or would have.
    """

    n: int
    mean: float
    p10: int
    p50: int
    p90: int
    longest: int
    truncated: float

    @classmethod
    def of(cls, tokens: Sequence[int], truncated: Sequence[bool]) -> Lengths:
        """The lengths of at least one answer.

        Args:
            tokens: Of each answer.
            truncated: Whether the limit ended it.
        """
        ordered = sorted(tokens)
        n = len(ordered)
        p10, p50, p90 = (ordered[max(0, -(-n * tenth // 10) - 1)] for tenth in (1, 5, 9))
        return cls(n, sum(ordered) / n, p10, p50, p90, ordered[-1], sum(truncated) / n)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)
