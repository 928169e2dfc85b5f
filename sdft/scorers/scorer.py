"""What a scorer is, and what it may do beside scoring one response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from sdft.examples import Example


@runtime_checkable
class Scorer(Protocol):
    """Anything callable as `scorer(response, example) -> score`."""

    def __call__(self, response: str, example: Example) -> float:
        """Score `response`, the decoded answer without special tokens, in [0, 1]."""


@runtime_checkable
class Explaining(Protocol):
    """A scorer that can say why a response is wrong."""

    def explain(self, response: str, example: Example) -> str | None:
        """Why the response does not score 1, in a sentence; None where it does."""


@runtime_checkable
class ScoresTogether(Protocol):
    """A scorer that prefers many responses at once: one that has to ask a model or a process."""

    def score_all(self, responses: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """One score per response, those that `__call__` would give."""


@runtime_checkable
class Detailed(Protocol):
    """A scorer that knows other scores of the same responses, as a judge's lenient ones."""

    def details(
        self, responses: Sequence[str], examples: Sequence[Example]
    ) -> dict[str, list[float]]:
        """Named scores in [0, 1], one per response under each name."""


def explained(scorer: Scorer, response: str, example: Example) -> str | None:
    """Why a response does not score 1; None where it does, or where the scorer cannot say.

    Scorers that prefer many responses at once are not asked: one by one they cost too much.
    """
    if not isinstance(scorer, Explaining) or isinstance(scorer, ScoresTogether):
        return None
    try:
        return scorer.explain(response, example)
    except ValueError as error:
        return f"cannot be scored: {error}"
