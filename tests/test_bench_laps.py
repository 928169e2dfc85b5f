"""Medians, ratios and exponents of given steps."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_prepare import load

laps = load("bench_laps")


def lap(seconds: float, **options: Any) -> Any:
    return laps.Lap(seconds, **options)


def test_a_summary_is_made_of_medians() -> None:
    steps = [
        lap(
            3.0,
            phases={"generate": 2.0, "update": 1.0, "track": 9.0},
            completions=[4, 1],
            held=5,
            peak=8,
        ),
        lap(1.0, phases={"generate": 0.5}, completions=[2], held=6, peak=9),
        lap(2.0, phases={"generate": 1.0, "update": 0.4}, completions=[3, 4]),
    ]
    assert laps.summary(steps) == {
        "seconds": 2.0,
        "all_seconds": [3.0, 1.0, 2.0],
        "phases": {"generate": 1.0, "update": 0.4},
        "completion_tokens": 5,
        "peak_memory_bytes": 9,
        "held_memory_bytes": 5,
    }
    assert laps.summary([lap(1.0)])["completion_tokens"] is None


def test_ratios_are_medians_over_pairs_and_none_where_one_did_not_run() -> None:
    results = {
        "ours": {"all_seconds": [2.0, 4.0, 9.0]},
        "sft": {"all_seconds": [1.0, 4.0, 3.0]},
        "generate": {"all_seconds": [4.0, 2.0, 9.0]},
    }
    assert laps.ratios(results) == {
        "sdft_over_sft": 2.0,
        "generate_over_ours": 1.0,
        "trl_over_ours": None,
    }
    assert laps.ratios({"ours": results["ours"]})["sdft_over_sft"] is None


@given(
    power=st.floats(-2, 3),
    factor=st.floats(1e-3, 1e3),
    sizes=st.lists(st.integers(1, 10_000), min_size=2, max_size=6, unique=True),
)
def test_the_exponent_of_a_power_law_is_its_power(
    power: float, factor: float, sizes: list[int]
) -> None:
    values = [factor * size**power for size in sizes]
    assert laps.exponent(sizes, values) == pytest.approx(power, abs=1e-6)


def test_exponents_of_given_numbers() -> None:
    assert laps.exponent([1, 2, 4], [5.0, 5.0, 5.0]) == pytest.approx(0.0)
    # log2: (0, 0), (1, 2), (2, 2): slope Σ(x−1)(y−4/3) / Σ(x−1)² = 2/2.
    assert laps.exponent([1, 2, 4], [1.0, 4.0, 4.0]) == pytest.approx(1.0)
    assert laps.exponent([2, 2], [1.0, 2.0]) is None
    assert laps.exponent([1, 2], [0.0, 2.0]) is None


def test_an_interaction_is_what_is_left_of_a_product() -> None:
    sizes = {False: 3, True: 10}
    assert laps.interaction(lambda a, b: 7 + 2 * sizes[a] + 5 * sizes[b]) == 0
    assert laps.interaction(lambda a, b: sizes[a] * sizes[b]) == 49
