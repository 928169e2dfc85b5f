"""What was measured on one task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sdft.metrics import Estimate
from sdft.preflight.alignment import Alignment
from sdft.preflight.fitting import Fitting
from sdft.preflight.gap import Gap, Mean
from sdft.preflight.lengths import Lengths


@dataclass(frozen=True)
class Speed:
    """How fast the model answered the sample's bare prompts, greedily.

    Attributes:
        seconds: Of all answers.
        examples: How many.
        tokens: Of the answers.
        prompt_tokens: Of the prompts.
    """

    seconds: float
    examples: int
    tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class TaskFacts:
    """One task before training. What was not measured is None, and `missing` says why.

    Attributes:
        name: The task's.
        fitting: Its training examples against the limits; None where they cannot be read.
        problem: Why nothing could be measured; empty where something was.
        missing: What was not measured → why.
        examples: In the sample.
        without: Accuracy on the bare prompts, greedily.
        with_it: Accuracy on the prompts with the demonstration, the teacher's view.
        gap: The second minus the first.
        demonstrations: How well the demonstrations themselves score, taken as answers.
        divergence: From student to teacher per token of the student's rollouts.
        lengths: By whose answers: `rollouts`, `without`, `with`, `demonstrations`.
        artifacts: Share of answers with the demonstration that speak of it.
        alignment: Of both prompts.
        speed: How fast the bare prompts were answered.
        limit: `model.max_new_tokens`.
        room: Tokens that the model's context leaves for a prompt; None when unlimited.
    """

    name: str
    fitting: Fitting | None = None
    problem: str = ""
    missing: dict[str, str] = field(default_factory=dict)
    examples: int = 0
    without: Estimate | None = None
    with_it: Estimate | None = None
    gap: Gap | None = None
    demonstrations: float | None = None
    divergence: Mean | None = None
    lengths: dict[str, Lengths] = field(default_factory=dict)
    artifacts: float | None = None
    alignment: Alignment | None = None
    speed: Speed | None = None
    limit: int = 0
    room: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        fit = self.fitting
        return {
            "accuracy_without": self.without and self.without.score,
            "accuracy_without_ci95": self.without and list(self.without.ci95),
            "accuracy_with": self.with_it and self.with_it.score,
            "accuracy_with_ci95": self.with_it and list(self.with_it.ci95),
            "gap": self.gap and self.gap.to_dict(),
            "dropped_student": fit and fit.dropped_student,
            "dropped_teacher": fit and fit.dropped_teacher,
            "training_examples": fit and fit.total,
            "limits": fit and {"student": fit.limits[0], "teacher": fit.limits[1]},
            "longest_prompt": fit and {"student": fit.longest[0], "teacher": fit.longest[1]},
            "examples": self.examples,
            "demonstration_score": self.demonstrations,
            "divergence": self.divergence and self.divergence.to_dict(),
            "lengths": {name: own.to_dict() for name, own in self.lengths.items()},
            "max_new_tokens": self.limit,
            "artifacts_with": self.artifacts,
            "alignment": self.alignment and self.alignment.to_dict(),
            "missing": self.missing,
        }
