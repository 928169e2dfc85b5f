"""Cells from what lm-eval notes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sdft.metrics import Estimate
from sdft.suites.lm_results import Found


def results(
    samples: dict[str, list[dict[str, Any]]],
    whole: dict[str, dict[str, float]],
    lower: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Samples by task, `{metric: value}` each, with what lm-eval has made of them."""
    metrics = {m for own in samples.values() for sample in own for m in sample}
    return {
        "samples": {
            task: [
                {"doc_id": i, "filter": "none", "metrics": list(sample), **sample}
                for i, sample in enumerate(own)
            ]
            for task, own in samples.items()
        },
        "results": {n: {f"{m},none": v for m, v in own.items()} for n, own in whole.items()},
        "higher_is_better": {task: {m: m not in lower for m in metrics} for task in samples},
    }


def found(
    samples: dict[str, list[dict[str, Any]]],
    whole: dict[str, dict[str, float]],
    name: str = "t",
    **options: Any,
) -> Found:
    aggregations = options.pop("aggregations", {})
    return Found(name, results(samples, whole, options.pop("lower", ())), aggregations, **options)


FOUR = {"t": [{"acc": v, "norm": 1.0} for v in (1.0, 0.0, 0.0, 1.0)]}
HALF = {"t": {"acc": 0.5, "norm": 1.0}}


def test_a_score_per_example_with_the_other_metrics_as_details() -> None:
    cell = found(FOUR, HALF).cell("acc", None)
    assert (cell.score, cell.n) == (0.5, 4)
    assert cell.ci95 == Estimate.from_scores([1, 0, 0, 1]).ci95
    assert cell.details == {"norm": Estimate.from_scores([1.0] * 4)}


def test_what_does_not_fit_is_left_out_and_what_has_no_answer_scores_nothing() -> None:
    cell = found(FOUR, HALF, unfit={("t", 1)}, unanswered={("t", 3)}).cell("acc", None)
    assert (cell.score, cell.n) == (pytest.approx(1 / 3), 3)
    with pytest.raises(ValueError, match="not one of 4 examples fits"):
        found(FOUR, HALF, unfit={("t", i) for i in range(4)}).cell("acc", None)


GROUP = {"a": [{"acc": 1.0}] * 3 + [{"acc": 0.0}], "b": [{"acc": 0.0}]}


def test_a_group_counts_examples_or_tasks_as_lm_eval_does() -> None:
    by_size = found(GROUP, {"g": {"acc": 0.6}}, "g").cell(None, None)
    assert (by_size.score, by_size.n) == (pytest.approx(0.6), 5)
    by_task = found(GROUP, {"g": {"acc": 0.375}}, "g").cell(None, None)
    assert (by_task.score, by_task.n) == (pytest.approx(0.375), 5)
    assert by_task.ci95 != by_size.ci95
    without = found(GROUP, {}, "g").cell(None, None)
    assert without.score == pytest.approx(0.6)


def test_several_scores_per_example_take_examples_as_units() -> None:
    rows = {"t": [{"inst": [True, True, True]}, {"inst": [False]}, {"inst": [True, False]}]}
    cell = found(rows, {"t": {"inst": 4 / 6}}).cell(None, None)
    assert (cell.score, cell.n) == (pytest.approx(4 / 6), 3)
    assert cell.ci95 is not None
    low, high = cell.ci95
    assert low == 0.0
    assert high == 1.0  # three examples say little, six instructions would say more
    gone = found(rows, {"t": {"inst": 4 / 6}}, unanswered={("t", 0)}).cell(None, None)
    assert gone.score == pytest.approx(1 / 6)


def test_a_score_that_is_no_mean_has_a_bootstrap_interval() -> None:
    rows = {"t": [{"f1": (i % 2, (i // 2) % 2)} for i in range(40)]}

    def agreement(pairs: list[tuple[int, int]]) -> float:
        return sum(a == b for a, b in pairs) / len(pairs)

    chosen = found(rows, {"t": {"f1": 0.5}}, aggregations={"f1": agreement})
    cell = chosen.cell("f1", None)
    assert (cell.score, cell.n) == (0.5, 40)
    assert cell.ci95 is not None
    assert 0.25 < cell.ci95[0] < 0.45
    assert math.isclose(sum(cell.ci95), 1.0, abs_tol=0.15)
    assert cell == chosen.cell("f1", None), "the bootstrap is seeded"
    with pytest.raises(ValueError, match="cannot leave out"):
        found(rows, {"t": {"f1": 0.5}}, aggregations={"f1": agreement}, unfit={("t", 0)}).cell(
            None, None
        )


@pytest.mark.parametrize(
    ("metric", "chosen", "words"),
    [
        (None, None, "metric must be set; there are acc, norm"),
        ("f1", None, "metric 'f1' is not there; there are acc, norm"),
        ("acc", "strict", "filter 'strict' is not there; there are none"),
    ],
)
def test_a_choice_that_cannot_be_made_is_named(
    metric: str | None, chosen: str | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        found(FOUR, HALF).cell(metric, chosen)


def test_what_is_no_score_is_refused() -> None:
    lengths = {"t": [{"perplexity": (-3.0, 2)}, {"perplexity": (-1.0, 1)}]}
    with pytest.raises(ValueError, match="the better the lower"):
        found(lengths, {"t": {"perplexity": 3.0}}, lower=("perplexity",)).cell(None, None)
    with pytest.raises(ValueError, match="no score in"):
        found(lengths, {"t": {"perplexity": 3.0}}).cell(None, None)
