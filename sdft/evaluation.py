"""Greedy evaluation of one task: responses, scores, and what kind of responses they are."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdft.examples import Example
from sdft.metrics import Cell, Estimate
from sdft.scorers.scorer import Detailed, ScoresTogether
from sdft.tasks import Task
from sdft.thinking import Thoughts

log = logging.getLogger(__name__)

DEFAULT_ARTIFACTS = (
    r"(?i)^\W*(based on|according to|following|as (shown|given|seen|stated) in|similar to|like) "
    r"(the|this|your) (\w+ )?(text|article|passage|example|demonstration|response|context)",
    r"(?i)\b(example|sample) (response|answer) (above|given|provided)",
)
"""What a student picks up from a teacher that sees a demonstration (arXiv 2601.19897)."""


@dataclass(frozen=True)
class Response:
    """A decoded response.

    Attributes:
        text: What is scored, without special tokens.
        tokens: How many, an end-of-sequence token included.
        truncated: Whether the length limit ended it.
        ids: Its tokens, where they are kept.
        thoughts: Its thoughts and its answer; None where nobody tells them apart.
    """

    text: str
    tokens: int
    truncated: bool
    ids: tuple[int, ...] = ()
    thoughts: Thoughts | None = None

    @property
    def unanswered(self) -> bool:
        """Whether there is nothing to score, because the thoughts have no end."""
        return self.thoughts is not None and not self.thoughts.finished and not self.text


class Artifacts:
    """Tells whether a response carries an artifact of the demonstration.

    Args:
        patterns: Regular expressions; a response carries an artifact where any of them is found.
        opening_words: A response carries one, too, where it begins with the same so many words as
            the demonstration of its example, which the student has not seen; 0 does not compare.

    Raises:
        ValueError: A pattern that does not compile, or a negative number of words.
    """

    def __init__(self, patterns: Sequence[str] = DEFAULT_ARTIFACTS, opening_words: int = 0) -> None:
        if opening_words < 0:
            raise ValueError(
                f"retention.artifact_opening_words must be 0 or more, found {opening_words}"
            )
        self.opening_words = opening_words
        try:
            self.patterns = [re.compile(pattern) for pattern in patterns]
        except re.error as error:
            raise ValueError(f"artifact pattern {error.pattern!r} is no regex: {error}") from error

    def __call__(self, text: str, example: Example | None = None) -> bool:
        """Whether any pattern is found in `text`, or it begins as the example's demonstration."""
        return any(pattern.search(text) for pattern in self.patterns) or self._opens(text, example)

    def _opens(self, text: str, example: Example | None) -> bool:
        if self.opening_words == 0 or example is None or example.demonstration is None:
            return False
        opening = example.demonstration.split()[: self.opening_words]
        return bool(opening) and text.split()[: self.opening_words] == opening


def score_responses(
    task: Task, examples: Sequence[Example], responses: Sequence[Response]
) -> list[float]:
    """One score per response; 0 where thoughts without an end have left no answer.

    Raises:
        ValueError: The scorer raised or gave something that is no number in [0, 1]; names the
            task, the prompt and the cause.
    """
    pairs = _answered(examples, responses)
    if isinstance(task.scorer, ScoresTogether):
        asked = [example for example, _ in pairs], [response for _, response in pairs]
        scores = _scored_together(task, task.scorer, *asked) if pairs else []
    else:
        scores = [_scored(task, example, response) for example, response in pairs]
    for score in scores:
        if not 0.0 <= score <= 1.0:
            raise ValueError(f"the scorer of task {task.name!r} gave {score}, not in [0, 1]")
    return _with_unanswered(scores, responses)


def _answered(
    examples: Sequence[Example], responses: Sequence[Response]
) -> list[tuple[Example, Response]]:
    """What a scorer is asked about."""
    pairs = zip(examples, responses, strict=True)
    return [pair for pair in pairs if not pair[1].unanswered]


def _with_unanswered(scores: Sequence[float], responses: Sequence[Response]) -> list[float]:
    """The scores of the answered responses, and 0 for each of the others, in their order."""
    found = iter(scores)
    return [0.0 if response.unanswered else next(found) for response in responses]


def _scored(task: Task, example: Example, response: Response) -> float:
    try:
        return float(task.scorer(response.text, example))
    except Exception as error:  # a user's scorer may raise anything
        raise ValueError(
            f"the scorer of task {task.name!r} raised {type(error).__name__}: {error} "
            f"(prompt {example.prompt[:80]!r}, response {response.text[:80]!r})"
        ) from error


def _scored_together(
    task: Task, scorer: ScoresTogether, examples: Sequence[Example], responses: Sequence[Response]
) -> list[float]:
    try:
        scores = list(map(float, scorer.score_all([r.text for r in responses], examples)))
    except Exception as error:
        raise ValueError(
            f"the scorer of task {task.name!r} raised {type(error).__name__}: {error}"
        ) from error
    if len(scores) != len(responses):
        raise ValueError(
            f"the scorer of task {task.name!r} gave {len(scores)} scores for {len(responses)} "
            "responses"
        )
    return scores


def summarise(
    task: Task,
    examples: Sequence[Example],
    responses: Sequence[Response],
    artifacts: Artifacts,
) -> Cell:
    """One cell of the retention matrix; a scorer that raises costs only this cell's score."""
    if not responses:
        return Cell(score=None, n=0, error=f"{task.name!r} has no example to evaluate")
    n = len(responses)
    found = [response.thoughts for response in responses if response.thoughts is not None]
    unscored = Cell(
        score=None,
        n=n,
        mean_length=sum(response.tokens for response in responses) / n,
        truncated=sum(response.truncated for response in responses) / n,
        artifact=sum(
            artifacts(response.text, example)
            for response, example in zip(responses, examples, strict=True)
        )
        / n,
        thought_length=_mean([thoughts.tokens for thoughts in found]),
        unfinished=_mean([not thoughts.finished for thoughts in found]),
    )
    try:
        scored = Cell.from_scores(score_responses(task, examples, responses))
        details = _details(task, examples, responses)
    except ValueError as error:
        log.warning("%s", error)
        return replace(unscored, error=str(error))
    return replace(unscored, score=scored.score, ci95=scored.ci95, details=details)


def _mean(values: Sequence[float]) -> float | None:
    """None without any."""
    return sum(values) / len(values) if values else None


def _details(
    task: Task, examples: Sequence[Example], responses: Sequence[Response]
) -> dict[str, Estimate] | None:
    """What the scorer knows beside its scores; None where that is nothing."""
    if not isinstance(task.scorer, Detailed):
        return None
    try:
        pairs = _answered(examples, responses)
        found = task.scorer.details([r.text for _, r in pairs], [e for e, _ in pairs])
        scores = {name: _with_unanswered(own, responses) for name, own in found.items()}
        return {name: Estimate.from_scores(own) for name, own in scores.items()}
    except Exception as error:
        raise ValueError(
            f"the scorer of task {task.name!r} raised {type(error).__name__}: {error}"
        ) from error
