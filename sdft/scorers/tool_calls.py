"""Tool calls: read from a model's text in the usual formats, and compared as what they mean."""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sdft.examples import Example
from sdft.scorers.call_formats import BadCalls, Call, calls_in_text, calls_in_value
from sdft.scorers.json_values import same_json
from sdft.scorers.scorer import Scorer


class ToolCallMatch(Scorer):
    """1 when the response makes the calls of the answer, no more and no fewer, else 0.

    Calls are compared in any order: their names as a multiset, and the arguments of each as parsed
    JSON, nested too, with keys in any order and `1` equal to `1.0` (never to `true` or `"1"`). A
    call whose JSON is broken makes the response wrong; `explain` says why.

    The response is read as ToolAlpaca's lines `Action:` and `Action Input:` where it has any, else
    as JSON: `{"name", "arguments"}` (or `parameters`, `args`), `{"Action", "Action_Input"}`, a list
    of these, `<tool_call>` blocks, or OpenAI's `{"tool_calls": […]}` with arguments in a text. The
    answer is written in any of these forms, or as a Python literal of them.

    Args:
        merge_arguments: Score as the paper's released code does: names as a multiset, and the
            arguments of all calls merged into one object, a later call's over an earlier one's.
            Which call an argument belongs to is then not looked at.
    """

    def __init__(self, merge_arguments: bool = False) -> None:
        self.merge_arguments = merge_arguments

    def __call__(self, response: str, example: Example) -> float:
        """Compare the calls.

        Raises:
            ValueError: The answer of the example holds no calls.
        """
        return float(self.explain(response, example) is None)

    def explain(self, response: str, example: Example) -> str | None:
        """What is wrong with the calls; None where they are right."""
        wanted = wanted_calls(example.answer)
        try:
            found = calls_in_text(response)
        except BadCalls as error:
            return f"malformed: {error}"
        if not found and wanted:
            return "no call in the response"
        return self._difference(found, wanted)

    def _difference(self, found: Sequence[Call], wanted: Sequence[Call]) -> str | None:
        names = Counter(call.name for call in found)
        expected = Counter(call.name for call in wanted)
        if names != expected:
            return f"called {_shown(names)}, not {_shown(expected)}"
        if self.merge_arguments:
            one, other = merged(found), merged(wanted)
            return None if same_json(one, other) else f"arguments {one}, not {other}"
        return _unmatched(found, wanted)


def _shown(names: Counter[str]) -> str:
    return ", ".join(name if n == 1 else f"{name} ×{n}" for name, n in sorted(names.items()))


def _unmatched(found: Sequence[Call], wanted: Sequence[Call]) -> str | None:
    # Equality of JSON is transitive: taking the first equal call cannot spoil a later match.
    left = list(wanted)
    for call in found:
        equal = [i for i, own in enumerate(left) if own.same(call)]
        if not equal:
            rest = [own.arguments for own in left if own.name == call.name]
            return f"{call.name} with {_json(call.arguments)}, not {' or '.join(map(_json, rest))}"
        del left[equal[0]]
    return None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def merged(calls: Sequence[Call]) -> dict[str, Any]:
    """The arguments of all calls in one object; later ones win."""
    together: dict[str, Any] = {}
    for call in calls:
        together |= call.arguments
    return together


def wanted_calls(answer: str) -> list[Call]:
    """The calls of an answer: JSON, a Python literal, or the text that makes them.

    Raises:
        ValueError: There are none, or they are malformed.
    """
    try:
        value = _literal(answer)
        calls = calls_in_text(answer) if value is None else calls_in_value(value)
    except BadCalls as error:
        raise ValueError(f"ToolCallMatch: the answer {answer[:200]!r}: {error}") from error
    if not calls and value != []:
        raise ValueError(f"ToolCallMatch: the answer {answer[:200]!r} has no calls")
    return calls


def _literal(answer: str) -> Any:
    """The answer as a value; None where it is only text."""
    if not answer.lstrip().startswith(("[", "{")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            return read(answer.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None
