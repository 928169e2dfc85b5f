"""Verdicts by hand-made facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sdft.encoded import Encoded
from sdft.examples import Example, as_messages
from sdft.metrics import Estimate
from sdft.preflight.alignment import Alignment, Problem
from sdft.preflight.facts import TaskFacts
from sdft.preflight.fitting import Fitting
from sdft.preflight.gap import Gap, Mean
from sdft.preflight.lengths import Lengths
from sdft.preflight.verdict import Verdict

EXAMPLE = Encoded(Example(as_messages("a"), "b", "b"), [1], [1, 2])


def fit(student: int = 0, teacher: int = 0, total: int = 100) -> Fitting:
    left = total - student - teacher
    return Fitting([EXAMPLE] * left, total, student, teacher, (8, 16), (9, 20))


def scored(without: int, with_it: int, n: int = 64) -> dict[str, Any]:
    """So many of n right, those with the demonstration on top of those without."""
    a = [float(i < without) for i in range(n)]
    b = [float(i < with_it) for i in range(n)]
    return {
        "without": Estimate.from_scores(a),
        "with_it": Estimate.from_scores(b),
        "gap": Gap.of(a, b),
        "examples": n,
    }


def lengths(tokens: int = 10, cut: int = 0) -> Lengths:
    return Lengths.of([tokens] * 100, [i < cut for i in range(100)])


def facts(**changes: Any) -> TaskFacts:
    healthy = TaskFacts(
        "t",
        fit(),
        demonstrations=1.0,
        divergence=Mean(0.2, (0.1, 0.3), 64),
        lengths={key: lengths() for key in ("rollouts", "without", "with", "demonstrations")},
        artifacts=0.0,
        alignment=Alignment(),
        limit=32,
        **scored(10, 60),
    )
    return replace(healthy, **changes)


def test_a_healthy_task_goes() -> None:
    assert Verdict.of(facts()).grade == "go"
    assert Verdict.of(facts()).reasons == []


@pytest.mark.parametrize(
    ("changes", "grade", "told"),
    [
        (scored(64, 64), "no", "already solves"),
        (scored(59, 64), "weak", "nearly solves"),
        (scored(8, 8, n=8), "weak", "nearly solves"),  # eight examples prove nothing
        (scored(10, 10), "no", "does not help"),
        (scored(0, 0), "no", "does not help"),
        (scored(40, 10), "no", "hurts"),
        (scored(62, 20), "no", "hurts"),
        (scored(4, 6, n=8), "weak", "interval includes 0"),
        (scored(2, 20), "weak", "before its eyes"),
        ({"fitting": fit(student=4, teacher=4)}, "weak", "drop 8 of 100"),
        ({"fitting": fit(teacher=60)}, "no", "drop 60 of 100"),
        ({"fitting": fit(teacher=5)}, "go", ""),
        ({"divergence": Mean(1e-5, None, 64)}, "weak", "agree to 1.0e-05"),
        ({"divergence": None, "missing": {"divergence": "no token counts"}}, "no", "no token"),
        ({"artifacts": 0.4}, "weak", "carry an artifact"),
        ({"demonstrations": 0.3}, "weak", "30% of the demonstrations would pass"),
        ({"problem": "it has no training examples", "fitting": fit(total=0)}, "no", "no training"),
        ({"missing": {"accuracy_without": "the scorer raised"}}, "no", "the scorer raised"),
        ({"missing": {"accuracy_with": "the scorer raised"}}, "no", "the scorer raised"),
    ],
)
def test_what_speaks_against_a_task(changes: dict[str, Any], grade: str, told: str) -> None:
    verdict = Verdict.of(facts(**changes))
    assert verdict.grade == grade
    assert told in " ".join(map(str, verdict.reasons))


@pytest.mark.parametrize(
    ("key", "cut", "grade"),
    [
        ("with", 5, "go"),
        ("with", 30, "weak"),
        ("with", 60, "no"),
        ("demonstrations", 60, "no"),
        ("rollouts", 60, "weak"),
        ("without", 60, "go"),  # the rollouts speak for it
    ],
)
def test_answers_that_are_cut(key: str, cut: int, grade: str) -> None:
    own = facts()
    changed = replace(own, lengths={**own.lengths, key: lengths(cut=cut)})
    assert Verdict.of(changed).grade == grade


def test_growth_counts_where_it_has_a_limit_to_run_into() -> None:
    own = facts()
    grown = replace(own, lengths={**own.lengths, "with": lengths(24)})
    assert "2.4 × as long" in str(Verdict.of(grown).reasons[0])
    assert Verdict.of(replace(grown, limit=1000)).grade == "go"


def test_a_misalignment_of_few_examples_or_a_harmless_one_is_weak() -> None:
    problem = Problem("another end", "they differ", "change it", count=64, of=64)
    for changed, grade in (
        (problem, "no"),
        (replace(problem, count=2), "weak"),
        (replace(problem, harmless=True), "weak"),
    ):
        assert Verdict.of(facts(alignment=Alignment([changed]))).grade == grade


def test_a_method_without_a_teacher_is_not_blamed_for_it() -> None:
    names = ("accuracy_with", "gap", "divergence", "alignment")
    untaught = dict.fromkeys(names, "the method 'sft' has no teacher")
    own = facts(with_it=None, gap=None, divergence=None, alignment=None, missing=untaught)
    assert Verdict.of(own).grade == "go"


def test_the_worst_reason_stands_first_and_advice_names_the_limit() -> None:
    own = facts(fitting=fit(student=60), artifacts=0.4, room=12)
    verdict = Verdict.of(own)
    assert [reason.grade for reason in verdict.reasons] == ["no", "weak"]
    assert "raise data.max_student_tokens to 9 (now 8)" in verdict.reasons[0].change
    assert "leaves 12 tokens for a prompt" in verdict.reasons[0].change
