"""Scorers: how well a response answers an example, from 0 to 1.

A scorer is any callable `scorer(response, example) -> score`. Those here inherit `Scorer`, so that
a YAML file may name them without their module (`class_path: JSONMatch`); one of your own only needs
the same `__call__`.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol, runtime_checkable

from sdft.examples import Example


@runtime_checkable
class Scorer(Protocol):
    """Anything callable as `scorer(response, example) -> score`."""

    def __call__(self, response: str, example: Example) -> float:
        """Score `response`, the decoded answer without special tokens, in [0, 1]."""


class ExactMatch(Scorer):
    """1 when the response is the answer, whatever the white space, else 0.

    Args:
        ignore_case: Compare without regard to case.
        strip_punctuation: Remove every punctuation mark from both sides before comparing. This
            also removes minus signs and decimal points: use `NumericMatch` for numbers.
    """

    def __init__(self, ignore_case: bool = True, strip_punctuation: bool = False) -> None:
        self.ignore_case = ignore_case
        self.strip_punctuation = strip_punctuation

    def __call__(self, response: str, example: Example) -> float:
        """Compare the normalised texts."""
        return float(self._normalise(response) == self._normalise(example.answer))

    def _normalise(self, text: str) -> str:
        if self.ignore_case:
            text = text.casefold()
        if self.strip_punctuation:
            text = "".join(mark for mark in text if not _is_punctuation(mark))
        return " ".join(text.split())


def _is_punctuation(character: str) -> bool:
    # ASCII counts `$ + < = > ^ | ~` and the backtick as punctuation, Unicode calls them symbols.
    return character in string.punctuation or unicodedata.category(character).startswith("P")


class JSONMatch(Scorer):
    """1 when the first complete JSON value of the response equals the answer's, else 0.

    Text and code fences around the value are ignored, and so are the order of keys and the way a
    number is written (`1` is `1.0`, but never `true`). When the answer is an object or a list, only
    objects and lists count as values, so that "Here are 2 calls: {...}" is read as meant. A value
    that breaks off scores 0, whatever complete values it holds.
    """

    def __call__(self, response: str, example: Example) -> float:
        """Compare the parsed values.

        Raises:
            ValueError: The answer of the example is not JSON.
        """
        try:
            answer = json.loads(example.answer)
        except ValueError as error:
            raise ValueError(
                f"JSONMatch: the answer {example.answer!r} is not JSON: {error}"
            ) from error
        start = _CONTAINER if isinstance(answer, dict | list) else _VALUE
        return float(any(_same_json(value, answer) for value in _first_json(response, start)))


_CONTAINER = re.compile(r"[\[{]")
_VALUE = re.compile(r'[\[{"]|-?\d|\b(?:true|false|null)\b')


def _first_json(text: str, start: re.Pattern[str]) -> list[Any]:
    """The first complete JSON value of `text` that begins as `start` says, or nothing."""
    decoder = json.JSONDecoder()
    found = start.search(text)
    while found:
        try:
            return [decoder.raw_decode(text, found.start())[0]]
        except json.JSONDecodeError as error:
            # What was read before the error belongs to the broken value: never look inside it.
            found = start.search(text, max(error.pos, found.start() + 1))
        except (RecursionError, ValueError):  # thousands of brackets or digits: a model gone astray
            return []
    return []


def _same_json(left: Any, right: Any) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same_json(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same_json, left, right))
    # Python holds `True == 1`, JSON does not.
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


class NumericMatch(Scorer):
    """1 when the last number of the response equals the last number of the answer, else 0.

    Reads signs, decimals, exponents and thousands separators (`-1,234.50`, `$18`, `#### 72`).
    Values are compared exactly: `72` is `72.00`, but `0.33` is not `1/3`.
    """

    def __call__(self, response: str, example: Example) -> float:
        """Compare the last numbers.

        Raises:
            ValueError: The answer of the example has no number.
        """
        answer = _last_number(example.answer)
        if answer is None:
            raise ValueError(f"NumericMatch: the answer {example.answer!r} has no number")
        return float(_last_number(response) == answer)


_NUMBER = re.compile(
    r"""(?<!\w)(?<!\d\.)                         # not inside a word, an identifier or a number
        (?P<sign>[-+−]?)[$€£]?
        (?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)
        (?P<exponent>(?:[eE][-+]?\d+)?)""",
    re.VERBOSE,
)


def _last_number(text: str) -> Decimal | None:
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    sign, digits, exponent = found[-1].group("sign", "digits", "exponent")
    try:
        return Decimal(sign.replace("−", "-") + digits.replace(",", "") + exponent)
    except InvalidOperation:  # an exponent beyond all bounds: no number to compare with
        return None


class RegexMatch(Scorer):
    """1 when what a pattern finds last in the response is exactly the answer, else 0.

    Args:
        pattern: A Python regular expression. Its first group is compared with the answer, or the
            whole match when it has no group. Matches of no characters are ignored.

    Raises:
        ValueError: The pattern is empty or not a regular expression.
    """

    def __init__(self, pattern: str) -> None:
        if not pattern:
            raise ValueError("RegexMatch: the pattern is empty")
        try:
            self._compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"RegexMatch: the pattern {pattern!r} is not a regular expression: {error}"
            ) from error
        self.pattern = pattern

    def __call__(self, response: str, example: Example) -> float:
        """Compare the last match with the answer as it is."""
        found = [match for match in self._compiled.finditer(response) if match.group()]
        group = min(self._compiled.groups, 1)
        return float(bool(found) and found[-1].group(group) == example.answer)
