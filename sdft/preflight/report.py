"""What a preflight has found, whole: what text, page and JSON are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdft import __version__
from sdft.preflight.estimate import RunEstimate
from sdft.preflight.facts import TaskFacts
from sdft.preflight.gap import INTERVALS
from sdft.preflight.verdict import Grade, Verdict


@dataclass(frozen=True)
class Report:
    """The findings.

    Attributes:
        model: Its name.
        method: The method's name.
        seed: Chose the sample and drew the rollouts.
        facts: Of each task, in sequence.
        verdicts: Of each task, in the same order.
        estimate: Of the run.
        teacher: Whether the method shows demonstrations to a teacher.
        command: What repeats it.
    """

    model: str
    method: str
    seed: int
    facts: Sequence[TaskFacts]
    verdicts: Sequence[Verdict]
    estimate: RunEstimate
    teacher: bool
    command: str

    @property
    def pairs(self) -> list[tuple[TaskFacts, Verdict]]:
        """Facts and verdict of each task."""
        return list(zip(self.facts, self.verdicts, strict=True))

    @property
    def grade(self) -> Grade:
        """The worst of all tasks."""
        grades = [verdict.grade for verdict in self.verdicts]
        return "no" if "no" in grades else "weak" if "weak" in grades else "go"

    @property
    def headline(self) -> str:
        """All verdicts in one sentence."""
        parts = []
        for grade in ("go", "weak", "no"):
            names = [fact.name for fact, verdict in self.pairs if verdict.grade == grade]
            if names:
                parts.append(f"{grade}: {', '.join(names)}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The content of `--json`."""
        return {
            "version": __version__,
            "model": self.model,
            "method": self.method,
            "seed": self.seed,
            "verdict": self.grade,
            "tasks": {
                fact.name: {
                    "verdict": verdict.grade,
                    "reasons": [reason.to_dict() for reason in verdict.reasons],
                    **fact.to_dict(),
                }
                for fact, verdict in self.pairs
            },
            "estimate": self.estimate.to_dict(),
            "intervals": INTERVALS,
        }
