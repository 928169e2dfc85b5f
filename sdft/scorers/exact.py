"""Texts compared word for word."""

from __future__ import annotations

import re
import string
import unicodedata

from sdft.examples import Example
from sdft.scorers.scorer import Scorer

_ARTICLE = re.compile(r"\b(?:a|an|the)\b", re.IGNORECASE)


class ExactMatch(Scorer):
    """1 when the response is the answer, whatever the white space, else 0.

    Args:
        ignore_case: Compare without regard to case.
        strip_punctuation: Remove every punctuation mark from both sides before comparing. This
            also removes minus signs and decimal points: use `NumericMatch` for numbers.
        drop_articles: Remove the English articles from both sides; with the other two this is how
            SQuAD normalises.
    """

    def __init__(
        self,
        ignore_case: bool = True,
        strip_punctuation: bool = False,
        drop_articles: bool = False,
    ) -> None:
        self.ignore_case = ignore_case
        self.strip_punctuation = strip_punctuation
        self.drop_articles = drop_articles

    def __call__(self, response: str, example: Example) -> float:
        """Compare the normalised texts."""
        return float(self._normalise(response) == self._normalise(example.answer))

    def _normalise(self, text: str) -> str:
        if self.ignore_case:
            text = text.casefold()
        if self.strip_punctuation:
            text = "".join(mark for mark in text if not _is_punctuation(mark))
        if self.drop_articles:
            text = _ARTICLE.sub(" ", text)
        return " ".join(text.split())


def _is_punctuation(character: str) -> bool:
    # ASCII counts `$ + < = > ^ | ~` and the backtick as punctuation, Unicode calls them symbols.
    return character in string.punctuation or unicodedata.category(character).startswith("P")
