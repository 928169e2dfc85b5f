"""The share of n-grams that a completion has said before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdft.batch import pad
from sdft.repetition import repetition
from sdft.rollout import Rollout


def rollout(rows: list[list[int]]) -> Rollout:
    ids_BT, mask_BT = pad(rows, 0, "right", torch.device("cpu"))
    return Rollout(ids_BT, mask_BT, torch.zeros(len(rows), dtype=torch.bool))


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=1, max_size=5))
def test_it_counts_what_comes_again(rows: list[list[int]]) -> None:
    for n in (1, 2, 4):
        expected = []
        for row in rows:
            grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
            expected.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
        assert repetition(rollout(rows), n).tolist() == pytest.approx(expected)


def test_a_loop_is_nearly_all_repetition() -> None:
    found = repetition(rollout([[5, 6] * 50, list(range(100)), [7]]))
    assert found[0] > 0.9
    assert found[1:].tolist() == [0.0, 0.0]
