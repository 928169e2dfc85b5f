"""pass@k: the estimator against counting, and what it is made of."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from sdft.metrics import Estimate
from sdft.pass_at import PassAt, pass_at_k


def by_counting(samples: int, passed: int, k: int) -> float:
    """The share of all k-subsets with a passing sample."""
    results = [True] * passed + [False] * (samples - passed)
    subsets = list(combinations(results, k))
    return sum(map(any, subsets)) / len(subsets)


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_it_is_the_share_of_subsets_that_hold_a_passing_sample(samples: int) -> None:
    for passed in range(samples + 1):
        for k in range(1, samples + 1):
            expected = by_counting(samples, passed, k)
            assert pass_at_k(samples, passed, k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("passed", [0, 1, 3, 128, 200])
def test_it_grows_with_k_and_ends_at_whether_any_passed(passed: int) -> None:
    values = [pass_at_k(200, passed, k) for k in range(1, 201)]
    assert values == sorted(values)
    assert values[0] == passed / 200
    assert values[-1] == float(passed > 0)


def test_nothing_is_lost_however_many_samples() -> None:
    assert pass_at_k(100_000, 1, 128) == pytest.approx(128 / 100_000, rel=1e-12)
    assert pass_at_k(100_000, 99_999, 1) == 0.99999


@pytest.mark.parametrize(("samples", "passed", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_numbers_that_cannot_be_are_refused(samples: int, passed: int, k: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        pass_at_k(samples, passed, k)


def test_estimates_are_means_over_prompts_and_only_full_marks_pass() -> None:
    scores = [[1, 0, 0.9, 0], [0, 0, 0, 0.99], [1, 1, 1, 1.0]]
    found = PassAt((1, 2, 4), 4).estimates(scores)
    assert list(found) == ["1", "2", "4"]
    assert found["1"].score == pytest.approx((1 / 4 + 0 + 1) / 3)
    assert found["2"].score == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert found["4"].score == pytest.approx(2 / 3)
    assert found["2"] == Estimate.from_scores([0.5, 0, 1])
    assert found["2"].ci95[0] < found["2"].score < found["2"].ci95[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ks": (0,)}, "k must be at least 1, found 0"),
        ({"ks": (3, 3)}, "3 is there twice"),
        ({"ks": (9,)}, "k = 9 needs as many samples, found retention.pass_samples = 8"),
        ({"ks": (1,), "samples": 0}, "pass_samples must be at least 1"),
        ({"ks": (1,), "temperature": 0.0}, "pass_temperature must be a finite number above 0"),
        ({"ks": (1,), "temperature": float("nan")}, "pass_temperature"),
        ({"ks": (1,), "limit": 0}, "pass_limit must be at least 1"),
    ],
)
def test_a_bad_setting_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PassAt(**{"samples": 8, **options})
