"""Whether a response says the answer's words, wherever in it they stand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from sdft.examples import Example
from sdft.scorers.scorer import Scorer

Level = Literal["strict", "lenient"]

_ARTICLES = {"a", "an", "the"}
_HALF = 0.5


class AnswerWords(Scorer):
    """Finds the answer's words in the response: for short facts, where no judge is at hand.

    Strict: the words of the answer, or of each of its parts, stand in the response one after the
    other. Lenient: one part does, or half of the answer's words stand somewhere. Case, punctuation
    and English articles do not count. Both scores are reported in any case. It takes "not Denver"
    for "Denver", and a response of many words finds more: look at the responses' length beside it.

    Args:
        score: The score of the task.
        separator: Stands between the parts of an answer that has several.
        max_words: Longest response that counts as strictly right, in words; null: any.

    Raises:
        ValueError: An unknown score, an empty separator, or no words allowed.
    """

    def __init__(
        self, score: Level = "strict", separator: str = ";", max_words: int | None = None
    ) -> None:
        if score not in get_args(Level):
            raise ValueError(
                f"AnswerWords: score must be one of {get_args(Level)}, found {score!r}"
            )
        if not separator.strip():
            raise ValueError("AnswerWords: the separator is empty")
        if max_words is not None and max_words < 1:
            raise ValueError(f"AnswerWords: max_words must be at least 1, found {max_words}")
        self.score: Level = score
        self.separator = separator
        self.max_words = max_words

    def __call__(self, response: str, example: Example) -> float:
        """Look for the words.

        Raises:
            ValueError: The answer of the example has no word.
        """
        return (
            self._strict(response, example)
            if self.score == "strict"
            else self._lenient(response, example)
        )

    def details(
        self, responses: Sequence[str], examples: Sequence[Example]
    ) -> dict[str, list[float]]:
        """Strict and lenient scores."""
        pairs = list(zip(responses, examples, strict=True))
        return {
            "strict": [self._strict(*pair) for pair in pairs],
            "lenient": [self._lenient(*pair) for pair in pairs],
        }

    def explain(self, response: str, example: Example) -> str | None:
        """Which part of the answer is missing."""
        said = answer_words(response)
        lacking = [part for part in self._parts(example) if not holds(said, part)]
        if lacking:
            return "does not say " + " nor ".join(repr(" ".join(part)) for part in lacking)
        return None if self._brief(said) else f"has {len(said)} words, {self.max_words} are allowed"

    def _strict(self, response: str, example: Example) -> float:
        said = answer_words(response)
        return float(self._brief(said) and all(holds(said, p) for p in self._parts(example)))

    def _lenient(self, response: str, example: Example) -> float:
        said, parts = answer_words(response), self._parts(example)
        words = {word for part in parts for word in part}
        found = len(words & set(said)) / len(words)
        return float(found >= _HALF or any(holds(said, part) for part in parts))

    def _brief(self, said: Sequence[str]) -> bool:
        return self.max_words is None or len(said) <= self.max_words

    def _parts(self, example: Example) -> list[list[str]]:
        parts = [answer_words(part) for part in example.answer.split(self.separator)]
        parts = [part for part in parts if part]
        if not parts:
            raise ValueError(f"AnswerWords: the answer {example.answer!r} has no word")
        return parts


def answer_words(text: str) -> list[str]:
    """The words of a text, without case, punctuation and English articles; all of "A" stays."""
    words = re.findall(r"\w+", text.casefold())
    return [word for word in words if word not in _ARTICLES] or words


def holds(words: Sequence[str], part: Sequence[str]) -> bool:
    """Whether `part` stands in `words`, one word after the other."""
    size = len(part)
    return any(list(words[i : i + size]) == list(part) for i in range(len(words) - size + 1))
