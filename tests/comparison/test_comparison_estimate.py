"""Means with intervals, and paired differences, against values worked out by hand."""

from __future__ import annotations

import pytest

from sdft.comparison.estimate import estimate, paired


def test_an_interval_worked_out_by_hand() -> None:
    # mean .6, variance (.01 + 0 + .01) / 2 = .01, t(2) = 4.303: ± 4.303 · .1 / √3 = .248434
    found = estimate([0.5, 0.6, 0.7])
    assert found.mean == pytest.approx(0.6)
    assert found.ci95 == pytest.approx((0.351566, 0.848434), abs=1e-5)
    assert found.note is None


def test_five_seeds() -> None:
    # variance .025, t(4) = 2.776: ± 2.776 · √.005 = .196293
    found = estimate([0.1, 0.2, 0.3, 0.4, 0.5])
    assert found.ci95 == pytest.approx((0.3 - 0.196293, 0.3 + 0.196293), abs=2e-4)


def test_two_seeds_are_wide() -> None:
    # half the range .01 times t(1) = 12.706
    found = estimate([0.5, 0.52])
    assert found.ci95 == pytest.approx((0.51 - 0.12706, 0.51 + 0.12706), abs=1e-6)


def test_an_interval_ends_where_a_score_does() -> None:
    assert estimate([0.9, 1.0], 0.0, 1.0).ci95 == (pytest.approx(0.95 - 0.6353), 1.0)


def test_one_seed_has_no_interval() -> None:
    found = estimate([0.5])
    assert (found.mean, found.ci95, found.note) == (0.5, None, "one seed: no interval")


def test_an_undefined_value_makes_the_mean_undefined() -> None:
    found = estimate([0.5, None, 0.7])
    assert (found.mean, found.ci95) == (None, None)
    assert found.note == "undefined in 1 of 3 seeds"
    assert found.to_dict()["values"] == [0.5, None, 0.7]


def test_no_seed() -> None:
    assert estimate([]).note == "no finished run"


def test_equal_values_say_no_more_than_that() -> None:
    found = estimate([0.5, 0.5, 0.5])
    assert found.ci95 == (0.5, 0.5)
    assert "all 3 seeds gave the same value" in str(found.note)


def test_rounding_is_no_spread() -> None:
    found = paired({0: 0.3, 1: 0.4}, {0: 0.1, 1: 0.2})
    assert 0.3 - 0.1 != 0.4 - 0.2, "as floats they differ"
    assert found.estimate.ci95 == (pytest.approx(0.2), pytest.approx(0.2))
    assert found.estimate.note


def test_a_difference_is_taken_seed_by_seed() -> None:
    # Both methods vary far more over seeds than their difference does.
    ours, theirs = {0: 0.5, 1: 0.9, 2: 0.7}, {0: 0.39, 1: 0.80, 2: 0.61}
    found = paired(ours, theirs)
    # differences .11, .10, .09: mean .1, deviation .01, ± 4.303 · .01 / √3 = .024843
    assert found.estimate.mean == pytest.approx(0.1)
    assert found.estimate.ci95 == pytest.approx((0.075157, 0.124843), abs=1e-5)
    assert found.verdict == "better"
    assert paired(theirs, ours).verdict == "worse"


def test_an_interval_that_holds_0_is_noise() -> None:
    found = paired({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.6})
    assert found.verdict == "noise"
    assert found.estimate.mean == pytest.approx(0.05)


def test_equal_scores_are_noise() -> None:
    assert paired({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}).verdict == "noise"


def test_only_seeds_that_both_have_count() -> None:
    found = paired({0: 0.5, 1: 0.6, 2: 0.9}, {1: 0.5, 2: 0.8, 3: 0.0})
    assert found.seeds == (1, 2)
    assert found.to_dict()["n"] == 2


@pytest.mark.parametrize("theirs", [{}, {5: 0.1}, {0: 0.1}, {0: None, 1: 0.2}])
def test_no_verdict_without_an_interval(theirs: dict[int, float | None]) -> None:
    found = paired({0: 0.5, 1: 0.6}, theirs)
    assert found.verdict is None
    assert found.estimate.note
    assert found.to_dict()["ci95"] is None
