"""One column of a check: what it was, what it is, and whether it fell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sdft.metrics import Cell

Outcome = Literal["kept", "fell", "unscored"]


@dataclass(frozen=True)
class Verdict:
    """A column, then and now.

    A column fell when its score is below the lower end of the baseline's 95 % interval by more than
    is allowed. A model that answers greedily is not drawn anew, so that the interval is about the
    examples: chance alone, with other examples of the same kind, takes a score below it once in
    forty times.

    Attributes:
        name: The column.
        is_suite: Whether it is a suite.
        then: The baseline's cell.
        now: The cell just measured.
        allowed: How far below the interval's end it may lie.
        seconds: What measuring took.
    """

    name: str
    is_suite: bool
    then: Cell
    now: Cell
    allowed: float = 0.0
    seconds: float = 0.0

    @property
    def floor(self) -> float | None:
        """The lowest score that counts as kept; None where the baseline has no score."""
        if self.then.score is None:
            return None
        low = self.then.ci95[0] if self.then.ci95 else self.then.score
        return max(0.0, low - self.allowed)

    @property
    def outcome(self) -> Outcome:
        """Kept, fell, or not scored on one of the two occasions."""
        if self.now.score is None or self.floor is None:
            return "unscored"
        # A score is a mean of n: not below for rounding's sake.
        return "fell" if self.now.score < self.floor - 1e-9 else "kept"

    @property
    def reason(self) -> str:
        """A sentence for a person."""
        if self.now.score is None:
            return f"{self.name} could not be scored: {self.now.error or 'no examples'}"
        if self.floor is None or self.then.score is None:
            return f"{self.name}: the baseline has no score ({self.then.error or 'no examples'})"
        allowed = f", {self.allowed:g} below its interval allowed" if self.allowed else ""
        return (
            f"{self.name}: {self.now.score:.3f}, was {self.then.score:.3f} "
            f"(lowest that is kept {self.floor:.3f}{allowed})"
        )

    @property
    def remarks(self) -> list[str]:
        """What makes the comparison less sure than it looks."""
        if self.now.n != self.then.n:
            return [
                f"{self.name}: measured on {self.now.n} examples, the baseline on {self.then.n}"
            ]
        return []

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": "suite" if self.is_suite else "task",
            "verdict": self.outcome,
            "floor": self.floor,
            "reason": self.reason,
            "now": self.now.to_dict(),
            "baseline": self.then.to_dict(),
            "seconds": round(self.seconds, 3),
        }


def table(verdicts: list[Verdict]) -> str:
    """All columns as plain text."""
    head = ("", "was", "95 %", "is", "n", "length", "truncated", "artifact", "")
    lines = [head, *map(_line, verdicts)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    )


def _line(verdict: Verdict) -> tuple[str, ...]:
    then, now = verdict.then, verdict.now
    return (
        ("suite " if verdict.is_suite else "") + verdict.name,
        _shown(then.score),
        "{:.2f}–{:.2f}".format(*then.ci95) if then.ci95 else "",
        _shown(now.score),
        str(now.n),
        f"{_shown(then.mean_length, 1)}→{_shown(now.mean_length, 1)}",
        f"{_shown(then.truncated)}→{_shown(now.truncated)}",
        f"{_shown(then.artifact)}→{_shown(now.artifact)}",
        "" if verdict.outcome == "kept" else verdict.outcome.upper(),
    )


def _shown(value: float | None, digits: int = 2) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"
