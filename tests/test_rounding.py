"""Stochastic rounding: exact where it can be, unbiased where it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from sdft.rounding import stochastic_round


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def test_what_bfloat16_can_hold_comes_back() -> None:
    values = torch.randn(1000).bfloat16()
    assert torch.equal(stochastic_round(values.float(), generator()), values)


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159e-5, -271.8])
def test_the_mean_is_kept_and_only_neighbours_are_drawn(value: float) -> None:
    drawn = stochastic_round(torch.full((200_000,), value), generator()).double()
    low, high = drawn.min().item(), drawn.max().item()
    assert low < value < high
    assert set(drawn.unique().tolist()) == {low, high}
    spread = (high - low) / 2 / 200_000**0.5
    assert abs(drawn.mean().item() - value) < 5 * spread


def test_a_seed_gives_its_own_rounding() -> None:
    values = torch.randn(100)
    first, again, other = (stochastic_round(values, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
