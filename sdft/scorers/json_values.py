"""JSON within a model's text: finding values, comparing them, and the scorers made of that."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sdft.examples import Example
from sdft.scorers.scorer import Scorer

CONTAINER = re.compile(r"[\[{]")
VALUE = re.compile(r'[\[{"]|-?\d|\b(?:true|false|null)\b')


@dataclass(frozen=True)
class Broken:
    """A value that begins and does not come to an end.

    Attributes:
        reason: Where it broke.
        begun: Whether anything of it was read: in prose, brackets mean nothing.
    """

    reason: str
    begun: bool = True


def values(text: str, start: re.Pattern[str] = CONTAINER) -> Iterator[Any]:
    """The complete JSON values of a text, in their order; a broken one as a `Broken`.

    Args:
        text: What a model has written.
        start: What a value begins with.
    """
    found = start.search(text)
    while found:
        try:
            value, end = decode(text, found.start())
        except json.JSONDecodeError as error:
            # What was read before the error belongs to the broken value: never look inside it.
            end = max(error.pos, found.start() + 1)
            begun = error.pos > found.start() + 1
            value = Broken(f"{error.msg} near {text[found.start() : end + 10][-40:]!r}", begun)
        except (RecursionError, ValueError):  # thousands of brackets or digits: a model gone astray
            yield Broken("nested too deeply, or a number too long")
            return
        yield value
        found = start.search(text, end)


def decode(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends.

    Raises:
        json.JSONDecodeError: No value, a broken one, or a constant that JSON does not have.
        RecursionError: Nested too deeply.
        ValueError: A number with too many digits.
    """
    value, end = _DECODER.raw_decode(text, start)
    return value, end


def _no_constant(name: str) -> Any:
    raise json.JSONDecodeError(f"{name} is not JSON", name, 0)


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def first_json(text: str, start: re.Pattern[str] = CONTAINER) -> list[Any]:
    """The first complete JSON value of `text` that begins as `start` says, or nothing."""
    whole = (value for value in values(text, start) if not isinstance(value, Broken))
    return list(islice(whole, 1))


def same_json(left: Any, right: Any) -> bool:
    """Whether two parsed values are equal: keys in any order, `1` is `1.0` but never `true`."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    # Python holds `True == 1`, JSON does not.
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


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
        answer = _parsed(example.answer, "JSONMatch")
        start = CONTAINER if isinstance(answer, dict | list) else VALUE
        return float(any(same_json(value, answer) for value in first_json(response, start)))


def _parsed(answer: str, name: str) -> Any:
    try:
        return json.loads(answer)
    except ValueError as error:
        raise ValueError(f"{name}: the answer {answer!r} is not JSON: {error}") from error


class JSONFieldMatch(Scorer):
    """1 when fields of the response's first JSON object hold what the answer says, else 0.

    Other fields are not looked at. Texts are compared without regard to case and white space,
    everything else as JSON.

    Args:
        fields: Paths into the object: keys and list indices joined by dots (`order.items.0.name`).
            All of them have to agree. The answer is an object with the same fields, or, for a
            single field, may be the value alone.
        ignore_case: Compare texts without regard to case.

    Raises:
        ValueError: No field, or an empty one.
    """

    def __init__(self, fields: list[str], ignore_case: bool = True) -> None:
        if not fields or not all(isinstance(field, str) and field for field in fields):
            raise ValueError(f"JSONFieldMatch: fields must be names, at least one, found {fields}")
        self.fields = list(fields)
        self.ignore_case = ignore_case

    def __call__(self, response: str, example: Example) -> float:
        """Compare field by field.

        Raises:
            ValueError: The answer has not all of the fields.
        """
        return float(self.explain(response, example) is None)

    def explain(self, response: str, example: Example) -> str | None:
        """The first field that differs; None where all agree."""
        wanted = self._wanted(example.answer)
        objects = [value for value in values(response) if isinstance(value, dict)]
        if not objects:
            return "no JSON object in the response"
        for field, value in zip(self.fields, wanted, strict=True):
            found = at_path(objects[0], field)
            if not found:
                return f"no field {field!r}"
            if not self._same(found[0], value):
                return f"field {field!r} is {found[0]!r}, not {value!r}"
        return None

    def _wanted(self, answer: str) -> list[Any]:
        try:
            parsed = json.loads(answer)
        except ValueError:
            parsed = answer
        found = [at_path(parsed, field) for field in self.fields]
        if all(found):
            return [values[0] for values in found]
        if len(self.fields) == 1 and not isinstance(parsed, dict):
            return [parsed]
        missing = [f for f, values in zip(self.fields, found, strict=True) if not values]
        raise ValueError(f"JSONFieldMatch: the answer {answer!r} has no field {missing[0]!r}")

    def _same(self, left: Any, right: Any) -> bool:
        if isinstance(left, str) or isinstance(right, str):
            return self._text(left) == self._text(right)
        return same_json(left, right)

    def _text(self, value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return " ".join((text.casefold() if self.ignore_case else text).split())


def at_path(value: Any, path: str) -> Sequence[Any]:
    """What stands at a dotted path, in a list of one; nothing where the path ends early."""
    for key in path.split("."):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return []
    return [value]
