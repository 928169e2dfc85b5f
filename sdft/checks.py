"""Checks on what a model has written, given by the user: each keeps a text or says why not.

A check is any callable `check(text, example, facts)` that returns the reason for dropping the text,
or None to keep it. Those here inherit `Check`, so that a YAML file may name them without their
module (`class_path: LengthCheck`); a class or a function of one's own is named by its import path.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, TypeAlias, runtime_checkable

from sdft.examples import Example
from sdft.scorers import Scorer


@dataclass(frozen=True)
class Facts:
    """What is known about a text beside its words.

    Attributes:
        tokens: Its tokens, the one that ends it not counted.
        truncated: Whether the length limit ended it.
        scorer: Scores it against its example; None where there is nothing to score with.
    """

    tokens: int
    truncated: bool
    scorer: Scorer | None = None


@runtime_checkable
class Check(Protocol):
    """Anything callable as `check(text, example, facts) -> str | None`."""

    def __call__(self, text: str, example: Example, facts: Facts) -> str | None:
        """The reason for dropping `text`, what was written in answer to `example`; None keeps."""


AnyCheck: TypeAlias = Check | Callable[[str, Example, Facts], str | None]
"""A check, or a function of one's own."""


class LengthCheck(Check):
    """Drops what is too short, too long, or was ended by the length limit.

    Args:
        min_tokens: Fewest tokens, the one that ends the text not counted; 1 drops empty texts.
        max_tokens: Most tokens; no limit when unset.
        drop_truncated: Drop what the length limit ended.

    Raises:
        ValueError: A bound below 0, or bounds that leave nothing.
    """

    def __init__(
        self, min_tokens: int = 1, max_tokens: int | None = None, drop_truncated: bool = True
    ) -> None:
        if min_tokens < 0:
            raise ValueError(f"LengthCheck: min_tokens must be 0 or more, found {min_tokens}")
        if max_tokens is not None and max_tokens < max(min_tokens, 1):
            raise ValueError(
                f"LengthCheck: max_tokens must be at least {max(min_tokens, 1)} (min_tokens is "
                f"{min_tokens}), found {max_tokens}"
            )
        self.min_tokens = min_tokens
        self.max_tokens = max_tokens
        self.drop_truncated = drop_truncated

    def __call__(self, text: str, example: Example, facts: Facts) -> str | None:
        """Compare the number of tokens."""
        if self.drop_truncated and facts.truncated:
            return "truncated"
        if facts.tokens < self.min_tokens:
            return f"shorter than {self.min_tokens} tokens"
        if self.max_tokens is not None and facts.tokens > self.max_tokens:
            return f"longer than {self.max_tokens} tokens"
        return None


class RegexCheck(Check):
    """Drops what lacks one pattern or has another; both are searched for anywhere in the text.

    Args:
        must_match: A Python regular expression that has to be found.
        must_not_match: One that must not be found.

    Raises:
        ValueError: No pattern at all, or one that is no regular expression.
    """

    def __init__(self, must_match: str | None = None, must_not_match: str | None = None) -> None:
        if not must_match and not must_not_match:
            raise ValueError("RegexCheck: give must_match or must_not_match, found neither")
        self.must_match = _compiled("must_match", must_match)
        self.must_not_match = _compiled("must_not_match", must_not_match)

    def __call__(self, text: str, example: Example, facts: Facts) -> str | None:
        """Search for the patterns."""
        if self.must_match and not self.must_match.search(text):
            return f"lacks {self.must_match.pattern!r}"
        if self.must_not_match and self.must_not_match.search(text):
            return f"has {self.must_not_match.pattern!r}"
        return None


def _compiled(key: str, pattern: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise ValueError(
            f"RegexCheck: {key} {pattern!r} is not a regular expression: {error}"
        ) from error


class RepetitionCheck(Check):
    """Drops what goes round in circles: too many of its n-grams of words stood there before.

    Args:
        ngram: Words of an n-gram.
        max_share: Largest share of n-grams that repeat an earlier one, in [0, 1).

    Raises:
        ValueError: A number out of range.
    """

    def __init__(self, ngram: int = 4, max_share: float = 0.3) -> None:
        if ngram < 1:
            raise ValueError(f"RepetitionCheck: ngram must be at least 1, found {ngram}")
        if not 0.0 <= max_share < 1.0:
            raise ValueError(f"RepetitionCheck: max_share must lie in [0, 1), found {max_share}")
        self.ngram = ngram
        self.max_share = max_share

    def __call__(self, text: str, example: Example, facts: Facts) -> str | None:
        """Count the n-grams."""
        words = text.casefold().split()
        places = range(len(words) - self.ngram + 1)
        ngrams = [tuple(words[place : place + self.ngram]) for place in places]
        repeated = len(ngrams) - len(set(ngrams))
        return "repeats itself" if repeated > self.max_share * len(ngrams) else None


class LanguageCheck(Check):
    """Drops what is in another language, as far as that can be told.

    Needs `py3langid` (`pip install 'sdft[language]'`), which knows some hundred languages, offline.
    Short texts, numbers and code say little about their language: they are kept.

    Args:
        languages: ISO 639-1 codes of those that are kept: `en`, `de`, …
        min_letters: Texts with fewer letters are kept.
        min_probability: How sure it has to be that the text is in another one, in (0, 1].

    Raises:
        ValueError: No language, an unknown one, a number out of range, or no `py3langid`.
    """

    def __init__(
        self, languages: list[str], min_letters: int = 20, min_probability: float = 0.9
    ) -> None:
        if min_letters < 1:
            raise ValueError(f"LanguageCheck: min_letters must be at least 1, found {min_letters}")
        if not 0.0 < min_probability <= 1.0:
            raise ValueError(
                f"LanguageCheck: min_probability must lie in (0, 1], found {min_probability}"
            )
        known = set(language_probabilities("a"))
        if not languages or not known.issuperset(languages):
            found = ", ".join(repr(name) for name in languages if name not in known) or "none"
            raise ValueError(
                f"LanguageCheck: languages must be among {', '.join(sorted(known))}; found {found}"
            )
        self.languages = set(languages)
        self.min_letters = min_letters
        self.min_probability = min_probability

    def __call__(self, text: str, example: Example, facts: Facts) -> str | None:
        """Ask which language it is."""
        if sum(map(str.isalpha, text)) < self.min_letters:
            return None
        probabilities = language_probabilities(text)
        likeliest = max(probabilities, key=lambda name: probabilities[name])
        elsewhere = sum(p for name, p in probabilities.items() if name not in self.languages)
        other = likeliest not in self.languages and elsewhere >= self.min_probability
        return f"in {likeliest!r}" if other else None


def language_probabilities(text: str) -> dict[str, float]:
    """How likely each known language is, by its ISO 639-1 code.

    Raises:
        ValueError: `py3langid` is not installed.
    """
    try:
        langid: Any = import_module("py3langid")
    except ImportError as error:
        raise ValueError("LanguageCheck needs py3langid: pip install 'sdft[language]'") from error
    scores = dict(langid.rank(text))  # logarithms, but for a constant
    most = max(scores.values())
    shares = {name: math.exp(score - most) for name, score in scores.items()}
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


class ScoreCheck(Check):
    """Drops what the task's scorer, or another one, scores too low.

    An example without an answer is kept, unless the scorer is one of its own here: a judge may do
    without.

    Args:
        minimum: Lowest score that is kept, in (0, 1].
        scorer: Asked in place of the task's: for example a `Judge`.

    Raises:
        ValueError: A minimum outside (0, 1].
    """

    def __init__(self, minimum: float = 1.0, scorer: Scorer | None = None) -> None:
        if not (math.isfinite(minimum) and 0.0 < minimum <= 1.0):
            raise ValueError(f"ScoreCheck: minimum must lie in (0, 1], found {minimum}")
        self.minimum = minimum
        self.scorer = scorer

    def __call__(self, text: str, example: Example, facts: Facts) -> str | None:
        """Score the text as a response.

        Raises:
            ValueError: There is no scorer.
        """
        scorer = self.scorer or facts.scorer
        if scorer is None:
            raise ValueError("there is no task here whose scorer could be asked")
        if self.scorer is None and not example.answer.strip():
            return None
        enough = float(scorer(text, example)) >= self.minimum
        return None if enough else f"scored below {self.minimum:g}"


def reason_to_drop(
    checks: Iterable[AnyCheck], text: str, example: Example, facts: Facts
) -> str | None:
    """What the first check that drops the text says; None where all keep it.

    Raises:
        ValueError: A check raised, or returned neither a text nor None; names it and the text.
    """
    for check in checks:
        name = getattr(check, "__name__", type(check).__name__)
        place = f"(text {text[:80]!r}, prompt {example.prompt[:80]!r})"
        try:
            reason = check(text, example, facts)
        except Exception as error:  # a user's check may raise anything
            raise ValueError(
                f"the check {name} raised {type(error).__name__}: {error} {place}"
            ) from error
        if reason is not None and not isinstance(reason, str):
            raise ValueError(
                f"the check {name} must return a text or None, found {reason!r} {place}"
            )
        if reason is not None:
            return reason or name
    return None


def count_reasons(reasons: Sequence[str | None]) -> dict[str, int]:
    """How many texts each reason has dropped, the most frequent first."""
    return dict(Counter(reason for reason in reasons if reason is not None).most_common())


def shown_reasons(counts: dict[str, int], most: int = 6) -> str:
    """The counts as a phrase: `3 truncated, 1 repeats itself`."""
    parts = [f"{count} {reason}" for reason, count in list(counts.items())[:most]]
    rest = sum(list(counts.values())[most:])
    return ", ".join([*parts, *([f"{rest} for other reasons"] if rest else [])])
