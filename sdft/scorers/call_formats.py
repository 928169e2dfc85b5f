"""The forms in which models write tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdft.scorers.json_values import Broken, decode, same_json, values

_LINE = re.compile(
    r"^[ \t>*_#-]*Action(?P<input>[ _-]?Input)?[ \t]*\d*[ \t*_]*:[ \t*_]*", re.MULTILINE
)
_FENCE = re.compile(r"\s*(?:```\w*\s*)?")
_NAMES = ("name", "Action", "action", "tool", "tool_name")
_ARGUMENTS = ("arguments", "Action_Input", "Action Input", "action_input", "parameters", "args")


class BadCalls(Exception):
    """Something that was meant as a call and is none."""


@dataclass(frozen=True)
class Call:
    """One call of a tool.

    Attributes:
        name: The tool's.
        arguments: Parsed JSON.
    """

    name: str
    arguments: dict[str, Any]

    def same(self, other: Call) -> bool:
        """Whether both do the same."""
        return self.name == other.name and same_json(self.arguments, other.arguments)


def calls_in_text(text: str) -> list[Call]:
    """The calls of a response, in their order; none where it makes none.

    Raises:
        BadCalls: One is malformed.
    """
    if any(not line["input"] for line in _LINE.finditer(text)):
        return _calls_in_lines(text)
    found: list[Call] = []
    for value in values(text):
        if isinstance(value, Broken):
            if value.begun:
                raise BadCalls(f"broken JSON: {value.reason}")
        elif is_call(value):
            found += calls_in_value(value)
    return found


def _calls_in_lines(text: str) -> list[Call]:
    """ToolAlpaca's form: `Action: NAME` and `Action Input: JSON`, each on a line of its own."""
    names: list[str] = []
    inputs: list[dict[str, Any]] = []
    line = _LINE.search(text)
    while line:
        if not line["input"]:
            end = text.find("\n", line.end())
            end = len(text) if end < 0 else end
            names.append(text[line.end() : end].strip(" \t\r`'\"*"))
        elif len(inputs) == len(names):
            raise BadCalls("an Action Input without an Action")
        else:
            value, end = _input(text, line.end(), names[len(inputs)])
            inputs.append(value)
        line = _LINE.search(text, end)  # behind the JSON: what it holds is no line
    if len(inputs) < len(names):
        raise BadCalls(f"no Action Input for {names[len(inputs)]!r}")
    return [Call(*pair) for pair in zip(names, inputs, strict=True)]


def _input(text: str, start: int, name: str) -> tuple[dict[str, Any], int]:
    fence = _FENCE.match(text, start)
    assert fence is not None, "it matches the empty text, too"
    start = fence.end()
    try:
        value, end = decode(text, start)
    except (ValueError, RecursionError) as error:
        raise BadCalls(f"the Action Input of {name!r} is not JSON ({error})") from error
    return _object(value, name), end


def is_call(value: Any) -> bool:
    """Whether a JSON value is meant as calls: it names a tool, or it is a list of such values."""
    if isinstance(value, list):
        return bool(value) and all(map(is_call, value))
    if not isinstance(value, Mapping):
        return False
    return "tool_calls" in value or _field(_inner(value), _NAMES) is not None


def calls_in_value(value: Any) -> list[Call]:
    """The calls that a parsed value describes.

    Raises:
        BadCalls: It describes something else, or one is malformed.
    """
    if isinstance(value, list):
        return [call for item in value for call in calls_in_value(item)]
    if isinstance(value, Mapping) and "tool_calls" in value:
        return calls_in_value(value["tool_calls"])
    if not is_call(value):
        raise BadCalls(f"no tool call: {json.dumps(value, ensure_ascii=False, default=repr)[:100]}")
    inner = _inner(value)
    name = _field(inner, _NAMES)
    if not isinstance(name, str):
        raise BadCalls(f"the name of a tool must be a text, found {name!r}")
    given = _field(inner, _ARGUMENTS)
    return [Call(name.strip(), _object({} if given is None else given, name))]


def _inner(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """What OpenAI's form wraps: `{"type": "function", "function": {"name", "arguments"}}`."""
    function = value.get("function")
    return function if isinstance(function, Mapping) else value


def _field(value: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((value[name] for name in names if value.get(name) is not None), None)


def _object(value: Any, name: str) -> dict[str, Any]:
    """Arguments as an object; a text of JSON is parsed once more.

    Raises:
        BadCalls: They are none.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadCalls(f"the arguments of {name!r} are not JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadCalls(f"the arguments of {name!r} must be an object, found {value!r:.60}")
    return value
