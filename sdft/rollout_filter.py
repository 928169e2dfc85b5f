"""Which of the student's own rollouts it learns from: those that all checks let through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sdft.batch import Batch
from sdft.checks import AnyCheck, Facts, reason_to_drop
from sdft.data import ContinualDataModule
from sdft.examples import Example
from sdft.rollout import Rollout
from sdft.scorers import Scorer


class RolloutFilter(Protocol):
    """Anything that says which rows of a batch are learnt from."""

    def __call__(self, batch: Batch, completion: Rollout) -> list[bool]:
        """Whether each of the batch's completions is kept."""


@dataclass(frozen=True)
class Judged:
    """A completion and what the checks said.

    Attributes:
        example: What it answers.
        text: Without special tokens.
        tokens: How many, the one that ends it not counted.
        truncated: Whether the length limit ended it.
        reason: Why it is dropped; None when it is kept.
    """

    example: Example
    text: str
    tokens: int
    truncated: bool
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        """For a file that a person reads."""
        return {
            "prompt": [dict(message) for message in self.example.messages],
            "demonstration": self.example.demonstration,
            "response": self.text,
            "tokens": self.tokens,
            "truncated": self.truncated,
            "reason": self.reason,
        }


class CheckFilter(RolloutFilter):
    """Asks checks about every completion, and keeps count.

    Args:
        checks: Asked in their order; the first that drops a completion says why.
        decode: Turns token ids into text without special tokens.
        scorers: The scorer of each training example, by its identity (`id`).

    Attributes:
        seen: Completions that were asked about.
        reasons: How many were dropped for each reason.
        dropped: Those of the last call that were dropped.
    """

    def __init__(
        self,
        checks: Sequence[AnyCheck],
        decode: Callable[[list[int]], str],
        scorers: Mapping[int, Scorer],
    ) -> None:
        self.checks, self.decode, self.scorers = list(checks), decode, scorers
        self.seen = 0
        self.reasons: Counter[str] = Counter()
        self.dropped: list[Judged] = []

    def judge(self, batch: Batch, completion: Rollout) -> list[Judged]:
        """What the checks say of each completion.

        Raises:
            ValueError: A check raised, or returned something else than a reason or None.
        """
        return [
            self._judged(example, ids, truncated)
            for example, ids, truncated in zip(
                batch.examples,
                completion.completions(),
                completion.truncated_B.tolist(),
                strict=True,
            )
        ]

    def __call__(self, batch: Batch, completion: Rollout) -> list[bool]:
        """Whether each completion is kept; a row that stands in for none is not counted."""
        found = self.judge(batch, completion)
        own = [one for one, real in zip(found, batch.real, strict=True) if real]
        self.dropped = [one for one in own if one.reason is not None]
        self.seen += len(own)
        self.reasons.update(str(one.reason) for one in self.dropped)
        return [one.reason is None for one in found]

    def _judged(self, example: Example, ids: list[int], truncated: bool) -> Judged:
        text, tokens = self.decode(ids), max(0, len(ids) - (not truncated))
        facts = Facts(tokens, truncated, self.scorers.get(id(example)))
        reason = reason_to_drop(self.checks, text, example, facts)
        return Judged(example, text, tokens, truncated, reason)


def scorers_of(data: ContinualDataModule) -> dict[int, Scorer]:
    """The scorer of every training example of a stream, by the example's identity."""
    return {
        id(item.example): task.scorer for task in data.tasks for item in data.encoded(task, "train")
    }
