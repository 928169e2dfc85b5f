"""Duplicates: texts that say the same in the same words, or nearly so."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

Ngrams = frozenset[tuple[str, ...]]


def words_of(text: str) -> list[str]:
    """Its words without regard to case, punctuation and white space."""
    return re.findall(r"\w+", text.casefold())


def ngrams_of(text: str, length: int) -> Ngrams:
    """The n-grams of its words; a shorter text is one n-gram."""
    words = words_of(text)
    count = max(len(words) - length + 1, 1)
    return frozenset(tuple(words[place : place + length]) for place in range(count))


def similarity(first: Ngrams, second: Ngrams) -> float:
    """Jaccard: n-grams in both over n-grams in either, from 0 to 1."""
    return len(first & second) / len(first | second)


class Duplicates:
    """Remembers texts and knows those that it has seen.

    Args:
        ngram: Words of an n-gram.
        threshold: Jaccard similarity of n-grams from which two texts are near-duplicates; 1 finds
            only texts of the same n-grams.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(self, ngram: int = 3, threshold: float = 0.7) -> None:
        if ngram < 1:
            raise ValueError(f"duplicate_ngram must be at least 1, found {ngram}")
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"duplicate_threshold must lie in (0, 1], found {threshold}")
        self.ngram = ngram
        self.threshold = threshold
        self._texts: set[tuple[str, ...]] = set()
        self._sizes: list[int] = []
        self._holders: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def reason(self, text: str) -> str | None:
        """Why `text` is a duplicate of one that was added; None when it is new."""
        if tuple(words_of(text)) in self._texts:
            return "duplicate"
        ngrams = ngrams_of(text, self.ngram)
        # Only texts that share an n-gram can be near: look them up instead of comparing with all.
        shared = Counter(holder for ngram in ngrams for holder in self._holders.get(ngram, ()))
        for holder, count in shared.items():
            if count / (len(ngrams) + self._sizes[holder] - count) >= self.threshold:
                return "near-duplicate"
        return None

    def add(self, text: str) -> None:
        """Remember `text`."""
        self._texts.add(tuple(words_of(text)))
        ngrams = ngrams_of(text, self.ngram)
        for ngram in ngrams:
            self._holders[ngram].append(len(self._sizes))
        self._sizes.append(len(ngrams))
