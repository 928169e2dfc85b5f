"""Tool calls: what counts as the same calls, in every form that models write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdft.examples import Example, as_messages
from sdft.scorers import ToolCallMatch

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "toolalpaca" / "eval.jsonl"
NESTED = {"where": {"city": "Ulm", "near": [1, 2.0]}, "text": "a } and { b, Action: none"}
GOLD = [
    {"Action": "find", "Action_Input": json.dumps(NESTED)},
    {"Action": "book", "Action_Input": '{"n": 1}'},
]


def example(gold: object = GOLD) -> Example:
    return Example(as_messages("p"), gold if isinstance(gold, str) else json.dumps(gold))


def lines(*calls: tuple[str, object]) -> str:
    said = [f"Thought: so\nAction: {n}\nAction Input: {json.dumps(a, indent=1)}" for n, a in calls]
    return "\n".join(said)


RIGHT = lines(("find", NESTED), ("book", {"n": 1}))
AS_JSON = [{"name": "book", "arguments": {"n": 1.0}}, {"name": "find", "arguments": NESTED}]
WRAPPED = [
    {"type": "function", "function": {"name": c["name"], "arguments": json.dumps(c["arguments"])}}
    for c in AS_JSON
]


@pytest.mark.parametrize(
    "response",
    [
        RIGHT,
        lines(("book", {"n": 1}), ("find", NESTED)),
        lines(
            ("find", {"text": NESTED["text"], "where": {"near": [1.0, 2], "city": "Ulm"}}),
            ("book", {"n": 1.0}),
        ),
        f"{RIGHT}\nObservation: done }}",
        RIGHT.replace("Action Input: ", "Action Input:\n```json\n").replace("}\nT", "}\n```\nT"),
        RIGHT.replace("Action: find", "**Action:** `find`"),
        f'Action: find\nAction: book\nAction Input: {json.dumps(NESTED)}\nAction Input: {{"n": 1}}',
        json.dumps(AS_JSON),
        f"Here are [the calls]: {json.dumps(AS_JSON[0])} and {json.dumps(AS_JSON[1])}",
        "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in AS_JSON),
        json.dumps({"tool_calls": WRAPPED}),
        json.dumps(WRAPPED),
        json.dumps([{"name": c["name"], "parameters": c["arguments"]} for c in AS_JSON]),
        json.dumps(GOLD),
    ],
)
def test_the_right_calls_in_any_form(response: str) -> None:
    assert ToolCallMatch().explain(response, example()) is None
    assert ToolCallMatch()(response, example()) == 1.0


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("", "no call in the response"),
        ("I would find Ulm.", "no call in the response"),
        (lines(("find", NESTED)), "called find, not book, find"),
        (RIGHT + "\n" + lines(("book", {"n": 1})), "called book ×2, find, not book, find"),
        (RIGHT.replace("Action: book", "Action: Book"), "called Book, find, not book, find"),
        (RIGHT.replace("2.0", "3"), "find with "),
        (RIGHT.replace('"n": 1', '"n": true'), 'book with {"n": true}, not {"n": 1}'),
        (RIGHT.replace('"n": 1', '"n": "1"'), 'book with {"n": "1"}, not {"n": 1}'),
        (RIGHT.replace('"n": 1', '"n": 1, "m": null'), "book with "),
        (RIGHT.replace('"n": 1', ""), 'book with {}, not {"n": 1}'),
        (RIGHT[:-1], "malformed: the Action Input of 'book' is not JSON"),
        (RIGHT.replace('"n": 1', "'n': 1"), "malformed: the Action Input of 'book' is not JSON"),
        (RIGHT.replace('"n": 1', '"n": NaN'), "malformed: the Action Input of 'book' is not JSON"),
        (RIGHT.rpartition("Action Input")[0], "malformed: no Action Input for 'book'"),
        (f"Action Input: {{}}\n{RIGHT}", "malformed: an Action Input without an Action"),
        (
            RIGHT.replace('{\n "n": 1\n}', "[1]"),
            "malformed: the arguments of 'book' must be an obj",
        ),
        (f"{json.dumps(AS_JSON[0])} {json.dumps(AS_JSON[1])[:-1]}", "malformed: broken JSON"),
        (json.dumps(AS_JSON).replace("book", "find"), "called find ×2, not book, find"),
        ('[{"name": 3}]', "malformed: the name of a tool must be a text"),
        ("Action: f\nAction Input: " + "[" * 100_000, "malformed: the Action Input of 'f'"),
    ],
)
def test_wrong_calls_and_the_reason(response: str, reason: str) -> None:
    found = ToolCallMatch().explain(response, example())
    assert found is not None
    assert found.startswith(reason)
    assert ToolCallMatch()(response, example()) == 0.0


def test_arguments_belong_to_their_call_unless_they_are_merged() -> None:
    gold = [
        {"Action": "f", "Action_Input": '{"a": 1}'},
        {"Action": "g", "Action_Input": '{"b": 2}'},
    ]
    swapped = lines(("f", {"b": 2}), ("g", {"a": 1}))
    assert ToolCallMatch()(swapped, example(gold)) == 0.0
    assert ToolCallMatch(merge_arguments=True)(swapped, example(gold)) == 1.0
    other = swapped.replace("2", "3")
    assert ToolCallMatch(merge_arguments=True)(other, example(gold)) == 0.0


def test_equal_calls_count_as_often_as_they_are_made() -> None:
    once, twice = [("f", {"a": 1})], [("f", {"a": 1}), ("f", {"a": 2})]
    gold = [{"name": n, "arguments": a} for n, a in twice]
    assert ToolCallMatch()(lines(*reversed(twice)), example(gold)) == 1.0
    assert ToolCallMatch()(lines(*once, *once), example(gold)) == 0.0


@pytest.mark.parametrize("write", [json.dumps, repr, lambda gold: RIGHT])
def test_an_answer_as_json_as_a_literal_or_as_text(write: object) -> None:
    assert callable(write)
    assert ToolCallMatch()(RIGHT, example(write(GOLD))) == 1.0


def test_an_answer_may_ask_for_no_call() -> None:
    assert ToolCallMatch()("Hello!", example([])) == 1.0
    assert ToolCallMatch()(RIGHT, example([])) == 0.0


@pytest.mark.parametrize(
    "answer", ["", "find", '{"a": 1}', '[{"Action": "f", "Action_Input": "{"}]']
)
def test_an_answer_without_calls_is_named(answer: str) -> None:
    with pytest.raises(ValueError, match="ToolCallMatch: the answer "):
        ToolCallMatch()("x", example(answer))


@pytest.mark.skipif(not SHARED.is_file(), reason="the real data is not here")
def test_the_real_answers() -> None:
    for line in SHARED.read_text("utf-8").splitlines():
        gold = json.loads(line)["golden_answer"]
        calls = [(call["Action"], json.loads(call["Action_Input"])) for call in gold]
        for said in (
            lines(*reversed(calls)),
            json.dumps([{"name": n, "args": a} for n, a in calls]),
        ):
            assert ToolCallMatch().explain(said, example(gold)) is None
            assert ToolCallMatch()(said + said.replace("[", " ["), example(gold)) == 0.0
