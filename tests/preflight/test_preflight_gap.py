"""The in-context gap and its interval."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdft.metrics import wilson_interval
from sdft.preflight.gap import Gap, Mean, paired_interval

SCORES = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1)


def table(both: int, gained: int, lost: int, neither: int) -> tuple[list[float], list[float]]:
    pairs = [(1.0, 1.0)] * both + [(0.0, 1.0)] * gained + [(1.0, 0.0)] * lost
    pairs += [(0.0, 0.0)] * neither
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_newcombes_interval_is_the_published_one() -> None:
    # Newcombe 1998, Statistics in Medicine 17:2635, table II, method 10, as (a, b, c, d) of 50.
    first, second = table(both=36, gained=2, lost=12, neither=0)
    low, high = paired_interval(second, first)
    assert (low, high) == pytest.approx((0.0569, 0.3404), abs=1e-4)


def test_newcombes_correction_of_a_positive_correlation() -> None:
    both, gained, lost, neither = 20, 12, 2, 16
    first, second = table(both, gained, lost, neither)
    n, p, q = 50, 32 / 50, 22 / 50
    (a, b), (c, d) = wilson_interval(32, n), wilson_interval(22, n)
    phi = (both * neither - gained * lost - n / 2) / (32 * 18 * 22 * 28) ** 0.5
    below = ((p - a) ** 2 - 2 * phi * (p - a) * (d - q) + (d - q) ** 2) ** 0.5
    above = ((b - p) ** 2 - 2 * phi * (b - p) * (q - c) + (q - c) ** 2) ** 0.5
    assert paired_interval(first, second) == pytest.approx((0.2 - below, 0.2 + above))


def test_all_alike_still_has_a_width() -> None:
    gap = Gap.of([0.0] * 20, [1.0] * 20)
    assert gap.mean == 1.0
    assert 0.7 < gap.ci95[0] < 1.0
    assert gap.ci95[1] == 1.0
    assert (gap.gained, gap.lost) == (20, 0)
    none = Gap.of([0.0] * 20, [0.0] * 20)
    assert none.ci95[0] == pytest.approx(-none.ci95[1])
    assert none.ci95[1] == pytest.approx(wilson_interval(0, 20)[1])


@given(SCORES)
def test_the_interval_holds_the_mean_and_turns_round_with_the_sides(
    pairs: list[tuple[float, float]],
) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    gap, turned = Gap.of(first, second), Gap.of(second, first)
    assert -1 <= gap.ci95[0] <= gap.mean <= gap.ci95[1] <= 1
    assert turned.ci95 == pytest.approx((-gap.ci95[1], -gap.ci95[0]))


def test_scores_between_take_students_t_of_the_differences() -> None:
    first, second = [0.2, 0.4, 0.6, 0.5], [0.3, 0.6, 0.7, 0.9]
    gap = Gap.of(first, second)
    differences = [0.1, 0.2, 0.1, 0.4]
    spread = (sum((d - 0.2) ** 2 for d in differences) / 3 / 4) ** 0.5
    assert gap.ci95 == pytest.approx((0.2 - 3.182 * spread, 0.2 + 3.182 * spread), abs=1e-3)


def test_the_interval_covers_what_it_should() -> None:
    draw, hits, runs = random.Random(0), 0, 400
    for _ in range(runs):
        first = [float(draw.random() < 0.3) for _ in range(40)]
        second = [max(a, float(draw.random() < 0.4)) for a in first]
        low, high = paired_interval(first, second)
        hits += low <= 0.7 * 0.4 <= high
    assert hits / runs > 0.92


def test_one_value_has_no_interval_of_its_mean() -> None:
    assert Mean.of([0.5]).ci95 is None
    low, high = Mean.of([0.0, 0.1, 0.2]).ci95 or (1, 1)
    assert low == 0.0  # cut: nothing is below 0
    assert high > 0.2
