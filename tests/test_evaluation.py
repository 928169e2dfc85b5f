"""Scores, intervals and artifacts of a task's responses."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
from conftest import echo_examples

from sdft import Example, PythonTask
from sdft.evaluation import Artifacts, Response, score_responses, summarise


def task_with(scorer: Any) -> PythonTask:
    return PythonTask("maths", test=echo_examples(3), scorer=scorer)


def summary(scorer: Any, *responses: Response) -> Any:
    task = task_with(scorer)
    return summarise(task, task.examples("test")[: len(responses)], responses, Artifacts())


THREE = (
    Response("a b", 2, False),
    Response("Based on the text, a", 6, True),
    Response("", 1, False),
)


def by_length(response: str, example: Example) -> float:
    return min(1.0, len(response) / 6)


def test_a_cell_holds_means_over_the_responses() -> None:
    cell = summary(by_length, *THREE)
    assert cell.n == 3
    assert cell.score == pytest.approx((0.5 + 1 + 0) / 3)
    assert cell.mean_length == 3.0
    assert cell.truncated == pytest.approx(1 / 3)
    assert cell.artifact == pytest.approx(1 / 3)
    assert cell.error is None
    assert cell.ci95[0] < cell.score < cell.ci95[1]


def test_a_scorer_sees_the_response_and_its_own_example() -> None:
    seen: list[tuple[str, str]] = []

    def scorer(response: str, example: Example) -> float:
        seen.append((response, example.prompt))
        return 1.0

    task = task_with(scorer)
    examples = task.examples("test")
    score_responses(task, examples, THREE)
    assert seen == [(r.text, e.prompt) for r, e in zip(THREE, examples, strict=True)]


def fails_on_the_second(response: str, example: Example) -> float:
    if response.startswith("Based"):
        raise KeyError("tool")
    return 1.0


def test_a_scorer_that_raises_costs_the_score_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sdft.evaluation"):
        cell = summary(fails_on_the_second, *THREE)
    assert (cell.score, cell.ci95, cell.n, cell.mean_length) == (None, None, 3, 3.0)
    for part in ("'maths'", "KeyError", "tool", "Based on the text", "prompt"):
        assert part in cell.error
        assert part in caplog.text


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, "high", None])
def test_a_score_that_is_no_share_is_an_error(value: Any) -> None:
    cell = summary(lambda response, example: value, *THREE)
    assert cell.score is None
    assert "'maths'" in cell.error


def test_nothing_to_evaluate_is_said() -> None:
    cell = summary(by_length)
    assert (cell.score, cell.n) == (None, 0)
    assert "'maths' has no example" in cell.error


@pytest.mark.parametrize(
    ("text", "carries"),
    [
        ("Based on the text, the answer is 4.", True),
        ("According to the article the answer is 4.", True),
        ("Following the example, I call f().", True),
        ("As shown in the example response", True),
        ("As in the example response above: 4", True),
        ("The answer is 4.", False),
        ("A bill based on the text was passed.", False),
        ("", False),
    ],
)
def test_artifacts_of_the_demonstration(text: str, carries: bool) -> None:
    assert Artifacts()(text) is carries


def test_patterns_of_ones_own() -> None:
    assert Artifacts(["^done"])("done: 4")
    assert not Artifacts(["^done"])("Based on the text")
    with pytest.raises(ValueError, match=r"artifact pattern '\(' is no regex"):
        Artifacts(["("])


class Together:
    """Scores many responses at once."""

    def __init__(self, scores: Any) -> None:
        self.scores = scores
        self.asked: list[int] = []

    def __call__(self, response: str, example: Example) -> float:
        raise AssertionError("one by one costs too much")

    def score_all(self, responses: list[str], examples: list[Example]) -> list[float]:
        self.asked.append(len(responses))
        if isinstance(self.scores, Exception):
            raise self.scores
        return list(self.scores)


def test_a_scorer_of_many_responses_is_asked_once() -> None:
    scorer = Together([1, 0.5, 0])
    assert summary(scorer, *THREE).score == 0.5
    assert scorer.asked == [3]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 1.0], "gave 2 scores for 3 responses"),
        ([1.0, 1.0, 2.0], "gave 2.0, not in [0, 1]"),
        (RuntimeError("no"), "raised RuntimeError: no"),
    ],
)
def test_a_scorer_of_many_that_fails_is_an_undefined_cell(scores: Any, message: str) -> None:
    cell = summary(Together(scores), *THREE)
    assert cell.score is None
    assert f"the scorer of task 'maths' {message}" in cell.error


class Knowing(Together):
    def details(self, responses: list[str], examples: list[Example]) -> dict[str, list[float]]:
        return {"lenient": [1.0] * len(responses)}


def test_other_scores_of_a_scorer_stand_beside_its_own() -> None:
    cell = summary(Knowing([1, 0, 0]), *THREE)
    assert cell.score == pytest.approx(1 / 3)
    assert {name: found.score for name, found in cell.details.items()} == {"lenient": 1.0}
    assert cell.from_dict(cell.to_dict()) == cell
    assert "details" not in summary(by_length, *THREE).to_dict()


def test_the_opening_of_the_demonstration() -> None:
    example = Example(({"role": "user", "content": "q"},), "b", demonstration="See the rule: b")
    three = Artifacts([], opening_words=3)
    assert three("See  the\nrule: c", example)
    assert not three("See the other", example)
    assert not three("See the", example)
    assert not three("See the rule: c")
    assert not Artifacts([])("See the rule: c", example)
    bare = Example(example.messages, "b")
    assert not three("See the rule: c", bare)
    whole = Example(example.messages, "b", demonstration="b")
    assert three("b", whole)
    with pytest.raises(ValueError, match="artifact_opening_words must be 0 or more, found -1"):
        Artifacts([], -1)


def test_a_cell_compares_each_response_with_its_own_demonstration() -> None:
    task = task_with(by_length)
    examples = task.examples("test")[:2]
    said = [Response(e.demonstration or "", 3, False) for e in reversed(examples)]
    artifacts = Artifacts([], opening_words=2)
    assert summarise(task, examples, said, artifacts).artifact == 0.0
    assert summarise(task, examples, said[::-1], artifacts).artifact == 1.0
