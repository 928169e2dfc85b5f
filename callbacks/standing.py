"""What probes have found in a stage and before it, and what follows: the judgement of `StageWatch`.

Pure functions of scores, without a trainer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

OnDrop = Literal["raise_weight", "stop", "both", "ignore"]

EPSILON = 1e-9
"""Rounding is no difference: 1 − 0.95 must not count as more than 0.05."""


@dataclass
class Standing:
    """What the probes have found so far, in plain numbers: a callback's state.

    Attributes:
        stage: The stage that `best` and `stale` belong to.
        best: The last score of the stage's own task that was an improvement; None before its first.
        stale: Probes since then.
        references: Best score of each column at the start of a stage.
    """

    stage: int = -1
    best: float | None = None
    stale: int = 0
    references: dict[str, float] = field(default_factory=dict)

    def begin(self, stage: int) -> None:
        """Forget the stage before; the references stay."""
        self.stage, self.best, self.stale = stage, None, 0

    def refer(self, scores: Mapping[str, float]) -> None:
        """Take the scores at the start of a stage into the references."""
        for name, score in scores.items():
            self.references[name] = max(score, self.references.get(name, score))

    def learn(self, score: float, min_delta: float) -> None:
        """Count a probe of the stage's own task."""
        if self.best is None or score > self.best + min_delta + EPSILON:
            self.best, self.stale = score, 0
        else:
            self.stale += 1

    def dropped(self, old: Mapping[str, float], max_drop: float) -> list[str]:
        """Columns that are more than `max_drop` below their reference, the deepest first.

        A column without a reference has its score for one.
        """
        depths = {name: self.references.setdefault(name, s) - s for name, s in old.items()}
        found = [name for name, depth in depths.items() if depth > max_drop + EPSILON]
        return sorted(found, key=lambda name: -depths[name])


@dataclass(frozen=True)
class Action:
    """What follows a probe.

    Attributes:
        action: `raise_weight`; `at_max`, where it cannot be raised further; `stop`.
        reason: The `drop` of an old column, or out of `patience` with the stage's own task.
        column: The column that gave the reason.
        reference: What its score is measured by: the reference of a drop, the best of patience.
        score: What the probe found.
        weight: The weight from now on; None where the method has none.
    """

    action: Literal["raise_weight", "at_max", "stop"]
    reason: Literal["drop", "patience"]
    column: str
    reference: float
    score: float
    weight: float | None

    def __str__(self) -> str:
        found = f"{self.column!r} at {self.score:.3f} "
        if self.reason == "drop":
            found += f"has dropped from {self.reference:.3f}"
        else:
            found += f"no longer improves on {self.reference:.3f}"
        if self.action == "stop":
            return f"{found}: the stage ends"
        how = "raised to" if self.action == "raise_weight" else "cannot be raised above"
        return f"{found}: distil_weight {how} {self.weight:.4g}"


@dataclass(frozen=True)
class Policy:
    """When a stage has had enough, and what a drop is answered with; see `StageWatch`.

    Raises:
        ValueError: A number out of range or an unknown `on_drop`.
    """

    patience: int | None
    min_delta: float
    max_drop: float
    on_drop: OnDrop
    raise_by: float
    max_weight: float

    def __post_init__(self) -> None:
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"watch.patience must be at least 1 or null, found {self.patience}")
        for key in ("min_delta", "max_drop", "raise_by", "max_weight"):
            value = getattr(self, key)
            if not (math.isfinite(value) and 0.0 <= value <= 1.0):
                raise ValueError(f"watch.{key} must lie in [0, 1], found {value}")
        if self.raise_by == 0.0:
            raise ValueError("watch.raise_by must be above 0: set watch.on_drop to ignore instead")
        if self.on_drop not in get_args(OnDrop):
            allowed = ", ".join(get_args(OnDrop))
            raise ValueError(f"watch.on_drop must be one of {allowed}, found {self.on_drop!r}")

    @property
    def raises(self) -> bool:
        """Whether a drop raises the weight."""
        return self.on_drop in ("raise_weight", "both")

    def judge(
        self, standing: Standing, own: str, scores: Mapping[str, float], weight: float | None
    ) -> list[Action]:
        """What follows a probe: one action for the deepest drop, one for lost patience.

        Args:
            standing: What was found before; takes the probe in.
            own: The stage's own task.
            scores: What the probe found: `own` and the old columns, those that have a score.
            weight: The method's weight; None where it has none.
        """
        actions = []
        old = {name: score for name, score in scores.items() if name != own}
        for name in standing.dropped(old, self.max_drop)[:1]:
            actions += self._on_drop(name, standing.references[name], old[name], weight)
        if own in scores:
            standing.learn(scores[own], self.min_delta)
            if self.patience is not None and standing.stale >= self.patience:
                assert standing.best is not None
                actions.append(Action("stop", "patience", own, standing.best, scores[own], weight))
        return actions

    def _on_drop(
        self, column: str, reference: float, score: float, weight: float | None
    ) -> list[Action]:
        if self.on_drop == "ignore":
            return []
        if self.on_drop == "stop":
            return [Action("stop", "drop", column, reference, score, weight)]
        assert weight is not None, "checked as fit starts"
        if weight < self.max_weight - EPSILON:
            raised = min(weight + self.raise_by, self.max_weight)
            return [Action("raise_weight", "drop", column, reference, score, raised)]
        verb: Literal["stop", "at_max"] = "stop" if self.on_drop == "both" else "at_max"
        return [Action(verb, "drop", column, reference, score, weight)]
