"""The sampler draws the right distribution, from small vocabularies and large ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdft.rollout import Sampling
from sdft.sampler import draw

SMALL = torch.tensor([0.0, 1.0, 2.0, -torch.inf, 0.5])


def large(tokens: int) -> Tensor:
    """A tenth of the tokens possible, both sides of every block's edge among them."""
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, generator=generator)
    possible = torch.rand(tokens, generator=generator) < 0.1
    possible[0] = possible[-1] = True
    possible[127::128] = possible[128::128] = True
    return logits.masked_fill(~possible, -torch.inf)


def assert_drawn_from(ids: Tensor, expected: Tensor) -> None:
    """Chi-square at about six standard deviations."""
    seen = ids.bincount(minlength=len(expected))
    assert len(seen) == len(expected)
    assert seen[expected == 0].sum() == 0
    count, freedom = len(ids), int((expected > 0).sum()) - 1
    error = (seen - count * expected).square() / (count * expected)
    assert error[expected > 0].sum() < freedom + 6 * (2 * freedom) ** 0.5 + 8


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1), [0, 1, 2, 4]),
        (Sampling(1, temperature=0.5), [0, 1, 2, 4]),
        (Sampling(1, top_k=2), [1, 2]),
        (Sampling(1, top_p=0.6), [1, 2]),
        (Sampling(1, top_p=0.5), [2]),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling, kept: list[int]) -> None:
    torch.manual_seed(0)
    ids = draw(SMALL.repeat(100_000, 1), sampling, torch.rand(100_000))
    expected = torch.zeros(5)
    expected[kept] = (SMALL[kept] / sampling.temperature).softmax(-1)
    assert_drawn_from(ids, expected)


@pytest.mark.parametrize("tokens", [1024, 1500, 4097])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_from_a_large_vocabulary_follow_the_distribution(
    tokens: int, temperature: float
) -> None:
    torch.manual_seed(0)
    logits, sampling = large(tokens), Sampling(1, temperature)
    ids = [draw(logits.repeat(1000, 1), sampling, torch.rand(1000)) for _ in range(50)]
    expected = (logits / temperature).softmax(-1)
    assert_drawn_from(torch.cat(ids), expected)
    with pytest.raises(AssertionError):  # the check has teeth
        assert_drawn_from(torch.cat(ids), expected.roll(128))


def test_a_draw_is_where_the_running_sum_exceeds_the_uniform_number() -> None:
    torch.manual_seed(0)
    logits = large(3000).repeat(200, 1)
    uniform = torch.rand(200)
    ids = draw(logits, Sampling(1), uniform)
    running = logits.double().softmax(-1).cumsum(-1)
    reached = running.gather(-1, ids[:, None]).squeeze(-1)
    before = reached - logits.double().softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    assert (before - 1e-6 <= uniform).all()
    assert (uniform <= reached + 1e-6).all()


@pytest.mark.parametrize("tokens", [4, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_impossible_token_at_the_ends(tokens: int, dtype: torch.dtype) -> None:
    logits = torch.full((2, tokens), -torch.inf, dtype=dtype)
    logits[:, 1] = logits[:, -2] = 0.0
    ends = torch.tensor([0.0, 1.0 - 2**-24])
    assert draw(logits, Sampling(1), ends).tolist() == [1, tokens - 2]


@pytest.mark.parametrize("tokens", [5, 1500])
def test_greedy_takes_the_likeliest(tokens: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, tokens)
    ids = draw(logits, Sampling(1, temperature=0.0), torch.rand(64))
    assert torch.equal(ids, logits.argmax(-1))


def test_the_logits_are_left_alone() -> None:
    logits = large(1500).repeat(3, 1)
    kept = logits.clone()
    for sampling in (Sampling(1), Sampling(1, 0.5, 0.9, 20), Sampling(1, 0.0)):
        draw(logits, sampling, torch.rand(3))
    assert torch.equal(logits, kept)
