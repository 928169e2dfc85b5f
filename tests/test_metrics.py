"""Intervals and the retention matrix, against values worked out by hand."""

import json
import math
import random
from typing import Any

import pytest
import torch

from sdft.metrics import (
    Cell,
    Estimate,
    RetentionMatrix,
    retention_metrics,
    score_interval,
    wilson_interval,
)

NAN = math.nan


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_published(successes: int, n: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(successes, n) == pytest.approx(expected, abs=6e-5)


def test_wilson_is_exact_at_the_ends_and_symmetric() -> None:
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0
    low, high = wilson_interval(2, 7)
    assert wilson_interval(5, 7) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (1, 0), (-1, 3), (4, 3), (NAN, 3)])
def test_wilson_rejects(successes: float, n: int) -> None:
    with pytest.raises(ValueError, match=r"needs at least one score|must lie in \[0, 3\]"):
        wilson_interval(successes, n)


def test_score_interval_of_zeros_and_ones_is_wilson() -> None:
    assert score_interval([1, 0, 1.0, 1]) == wilson_interval(3, 4)


@pytest.mark.parametrize(
    ("scores", "t"),
    # Quantiles of Student's t at .975 from tables, for n - 1 degrees of freedom.
    [([0.4, 0.5], 12.706), ([0.4, 0.5, 0.6], 4.3027), ([0.4, 0.5, 0.6, 0.5], 3.1824)],
)
def test_score_interval_of_partial_scores_is_students(scores: list[float], t: float) -> None:
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
    half = t * deviation / math.sqrt(len(scores))
    expected = (max(0, mean - half), min(1, mean + half))
    assert score_interval(scores) == pytest.approx(expected, abs=1e-3)


def test_score_interval_covers_the_mean_as_often_as_it_says() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(2000):
        low, high = score_interval([draw.random() for _ in range(20)])
        hits += low <= 0.5 <= high
    assert 0.935 < hits / 2000 < 0.965


@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.5, 0.5]])
def test_score_interval_without_spread_is_not_a_point(scores: list[float]) -> None:
    assert score_interval(scores) == wilson_interval(sum(scores), len(scores))


@pytest.mark.parametrize("scores", [[], [1.5], [0.2, -0.1], [1.0, NAN]])
def test_score_interval_rejects(scores: list[float]) -> None:
    with pytest.raises(ValueError, match=r"at least one score|must be a number in"):
        score_interval(scores)


def test_cell_from_scores() -> None:
    cell = Cell.from_scores([1, 0, 0, 0], mean_length=3.5, truncated=0.25, artifact=0.0)
    assert cell == Cell(0.25, 4, wilson_interval(1, 4), 3.5, 0.25, 0.0, None)


@pytest.mark.parametrize(
    "cell",
    [
        Cell.from_scores([1, 0.5], 2.0),
        Cell(None, 3, error="scorer raised KeyError: 'x'"),
        Cell(0.5, 2, (0.1, 0.9), kl_base=0.25, pass_at={"8": Estimate.from_scores([1, 0.5])}),
    ],
)
def test_cell_survives_json(cell: Cell) -> None:
    values = cell.to_dict()
    assert values["ci95"] is None or isinstance(values["ci95"], list)
    assert Cell.from_dict(json.loads(json.dumps(values, allow_nan=False))) == cell


def test_cell_from_the_least_json() -> None:
    assert Cell.from_dict({"score": 0.5, "n": 2, "ci95": [0.1, 0.9]}) == Cell(0.5, 2, (0.1, 0.9))


# Rows: base, stages 1..3; columns: tasks a, b, c, suites p, q.
ROWS = [
    [0.10, 0.20, 0.30, 0.90, 1.00],
    [0.80, 0.25, 0.20, 0.85, 1.00],
    [0.85, 0.90, 0.40, 0.80, 0.95],
    [0.60, 0.95, 0.70, 0.75, 1.00],
]


def compute(rows: list[list[float]]) -> dict[str, Any]:
    metric = RetentionMatrix(["a", "b", "c"], ["p", "q"])
    for row in rows:
        metric.update(torch.tensor(row, dtype=torch.float64))
    return dict(metric.compute())


def test_the_metrics_of_a_full_run() -> None:
    values = compute(ROWS)
    assert torch.equal(values["matrix"], torch.tensor(ROWS, dtype=torch.float64))
    assert values["acc"] == pytest.approx((0.60 + 0.95 + 0.70) / 3)
    assert values["bwt"] == pytest.approx(((0.60 - 0.80) + (0.95 - 0.90)) / 2)
    assert values["fwt"] == pytest.approx(((0.25 - 0.20) + (0.40 - 0.30)) / 2)
    # a was best after stage 2, b is best at the end.
    assert values["forgetting"] == pytest.approx(((0.85 - 0.60) + 0.0) / 2)
    assert values["retention"] == pytest.approx({"p": -0.15, "q": 0.0})
    assert values["undefined"] == {}


def test_the_metrics_after_two_of_three_stages_are_over_the_tasks_learnt() -> None:
    values = compute(ROWS[:3])
    assert values["acc"] == pytest.approx((0.85 + 0.90) / 2)
    assert values["bwt"] == pytest.approx(0.85 - 0.80)
    assert values["fwt"] == pytest.approx(0.25 - 0.20)
    assert values["forgetting"] == pytest.approx(0.0)
    assert values["retention"] == pytest.approx({"p": -0.10, "q": -0.05})


def test_forgetting_counts_a_best_score_before_training_but_not_the_base() -> None:
    rows = [
        [0.0, 1.0, 0.0, 0.5, 0.5],  # the base is better at b than any stage
        [0.5, 0.9, 0.0, 0.5, 0.5],  # b is best before stage 2 trains it
        [0.5, 0.6, 0.0, 0.5, 0.5],
        [0.5, 0.4, 0.5, 0.5, 0.5],
    ]
    assert compute(rows)["forgetting"] == pytest.approx((0.0 + (0.9 - 0.4)) / 2)


@pytest.mark.parametrize(
    ("stages", "undefined"),
    [
        (0, {"acc", "bwt", "fwt", "forgetting", "retention/p", "retention/q"}),
        (1, {"bwt", "fwt", "forgetting"}),
        (2, set()),
    ],
)
def test_too_few_stages_leave_metrics_undefined(stages: int, undefined: set[str]) -> None:
    values = compute(ROWS[: stages + 1])
    assert set(values["undefined"]) == undefined
    for name in undefined:
        group, _, suite = name.partition("/")
        assert (values[group][suite] if suite else values[group]) is None
        needed = "a finished stage" if name == "acc" or suite else "2 finished stages"
        assert values["undefined"][name] == f"needs {needed}, found {stages}"


def test_one_stage_has_an_acc_and_retention() -> None:
    values = compute(ROWS[:2])
    assert values["acc"] == pytest.approx(0.80)
    assert values["retention"] == pytest.approx({"p": -0.05, "q": 0.0})


def test_no_rows_at_all() -> None:
    values = retention_metrics(torch.empty(0, 2), ["a"], ["p"])
    assert values["acc"] is None
    assert values["retention"] == {"p": None}
    assert set(values["undefined"]) == {"acc", "bwt", "fwt", "forgetting", "retention/p"}


@pytest.mark.parametrize(
    ("row", "column", "undefined"),
    [
        (3, 0, {"acc", "bwt", "forgetting"}),
        (1, 0, {"bwt", "forgetting"}),
        (2, 0, {"forgetting"}),
        (2, 2, {"fwt"}),
        (0, 1, {"fwt"}),
        (0, 0, set()),  # the base's score on the first task enters nothing
        (0, 4, {"retention/q"}),
        (3, 3, {"retention/p"}),
        (2, 3, set()),
    ],
)
def test_a_nan_undefines_just_what_rests_on_it(row: int, column: int, undefined: set[str]) -> None:
    rows = [list(line) for line in ROWS]
    rows[row][column] = NAN
    values, whole = compute(rows), compute(ROWS)
    assert set(values["undefined"]) == undefined
    when = f"after stage {row}" if row else "of the base"
    assert set(values["undefined"].values()) <= {f"no score {when} on {'abcpq'[column]!r}"}
    for name in {"acc", "bwt", "fwt", "forgetting"} - undefined:
        assert values[name] == whole[name]


def test_bad_rows_are_rejected() -> None:
    metric = RetentionMatrix(["a"], ["p"])
    with pytest.raises(ValueError, match=r"needs 2 scores, found shape \(3,\)"):
        metric.update(torch.zeros(3))
    metric.update(torch.zeros(2))
    metric.update(torch.zeros(2))
    with pytest.raises(ValueError, match="all 1 stages already have their row"):
        metric.update(torch.zeros(2))


def test_a_restored_metric_continues_as_if_uninterrupted() -> None:
    first, second = (RetentionMatrix(["a", "b", "c"], ["p", "q"]) for _ in range(2))
    for row in ROWS[:2]:
        first.update(torch.tensor(row))
    second.load_state_dict(first.state_dict())
    for metric in (first, second):
        for row in ROWS[2:]:
            metric.update(torch.tensor(row))
    one, two = first.compute(), second.compute()
    assert torch.equal(one.pop("matrix"), two.pop("matrix"))
    assert one == two
    assert one["acc"] is not None


def test_reset_forgets_the_rows() -> None:
    metric = RetentionMatrix(["a"], [])
    metric.update(torch.tensor([0.5]))
    metric.reset()
    assert metric.rows == []
