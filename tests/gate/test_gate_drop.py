"""How far a column fell, and whether that is more than chance."""

from __future__ import annotations

import pytest
from conftest import make_task

from sdft.gate.drop import best_cells, difference_low, find_drops, references_of
from sdft.gate.settings import check_counts, check_drops, check_retry
from sdft.metrics import Cell


def cell(right: int, n: int = 100) -> Cell:
    return Cell.from_scores([1.0] * right + [0.0] * (n - right))


def test_the_interval_is_newcombes() -> None:
    """Newcombe 1998, table II, method 10: 56/70 and 48/80 give .0524 to .3339."""
    assert difference_low(cell(56, 70), cell(48, 80)) == pytest.approx(0.0524, abs=1e-4)


@pytest.mark.parametrize(
    ("now", "allowed", "certain", "fell"),
    [
        (90, 0.05, True, False),  # no fall
        (86, 0.05, True, False),  # within what is allowed
        (84, 0.05, True, False),  # further, but chance can do that
        (84, 0.05, False, True),
        (75, 0.05, True, True),
        (75, 0.2, True, False),
        (95, 0.0, False, False),  # a rise
        (85, 0.05, False, False),  # exactly what is allowed
    ],
)
def test_a_fall_is_further_than_allowed_and_than_chance(
    now: int, allowed: float, certain: bool, fell: bool
) -> None:
    drops = find_drops({"old": cell(90)}, {"old": cell(now)}, {"old": allowed}, certain)
    assert bool(drops) == fell


def test_what_can_no_longer_be_scored_has_fallen() -> None:
    (drop,) = find_drops({"old": cell(90)}, {"old": Cell(None, 100)}, {"old": 0.05}, True)
    assert (drop.was, drop.now) == (0.9, 0.0)
    assert "old fell from 0.900 to 0.000 (allowed 0.05" in str(drop)


def test_what_never_had_a_score_or_is_not_protected_is_not_looked_at() -> None:
    cells = {"a": cell(0), "b": cell(0)}
    assert find_drops({"a": Cell(None, 0), "b": cell(90)}, cells, {"a": 0.0}, False) == []


def test_suites_are_held_to_the_base_and_tasks_to_what_was_learnt() -> None:
    tasks = [make_task("first"), make_task("second")]
    rows = [
        {"first": cell(50), "second": cell(9), "suite": cell(80)},
        {"first": cell(40), "second": cell(7), "suite": cell(85)},
        {"first": cell(30), "second": cell(60), "suite": Cell(None, 0)},
    ]
    found = {name: one.score for name, one in references_of(tasks, rows).items()}
    assert found == {"first": 0.4, "second": 0.6, "suite": 0.85}
    assert best_cells([{"a": Cell(None, 3)}]) == {}


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_drops("undo", 0.1, {}), r"gate\.on_drop must be one of .*'undo'"),
        (lambda: check_drops("retry", 1.5, {}), r"gate\.max_drop must lie in \[0, 1\], found 1\.5"),
        (lambda: check_drops(None, 0.1, {"a": -1.0}), r"gate\.protect\.a must lie"),
        (lambda: check_counts(-1, 1, 1), r"gate\.every_n_steps must be at least 0"),
        (lambda: check_counts(0, 0, 1), r"gate\.probe_limit"),
        (lambda: check_counts(0, 1, 0), r"gate\.retries"),
        (lambda: check_retry("retry", 0.0, 0.0), r"gate\.retry_lr_factor must lie"),
        (lambda: check_retry("retry", 1.0, -0.5), r"gate\.retry_replay must be 0 or more"),
        (lambda: check_retry("retry", 1.0, 0.0), "would do the same again"),
    ],
)
def test_bad_settings_are_named(check: object, message: str) -> None:
    assert callable(check)
    with pytest.raises(ValueError, match=message):
        check()
