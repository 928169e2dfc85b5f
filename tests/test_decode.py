"""The decode loop gives what `model.generate` gives; its sampler draws the right distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import WORDS, make_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sdft.decode import DecodeEngine, draw
from sdft.rollout import GenerateEngine, Rollout, Sampling

SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def gemma3() -> PreTrainedModel:
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=8, layer_types=layers)
    return Gemma3ForCausalLM(config)


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    )
    return GPT2LMHeadModel(config)


MODELS = {
    "llama": make_model,
    "gpt2": gpt2,
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "gemma3": gemma3,
}


def lively(name: str) -> PreTrainedModel:
    """Weights large enough that greedy completions differ from one another; fp64."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def prompts(seed: int, count: int = 6, longest: int = 20) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(2, len(WORDS), (n,), generator=generator).tolist() for n in lengths]


def same(first: Rollout, second: Rollout) -> bool:
    return (
        first.completions() == second.completions()
        and first.truncated_B.tolist() == second.truncated_B.tolist()
    )


@pytest.mark.parametrize("name", MODELS)
def test_greedy_parity_with_generate(name: str) -> None:
    model = lively(name)
    greedy = Sampling(12, temperature=0.0)
    for seed, eos_ids in enumerate(([1], [1, 5, 7, 9], list(range(2, 16)), [])):
        expected = GenerateEngine().generate(model, prompts(seed), greedy, eos_ids, 0)
        assert same(DecodeEngine().generate(model, prompts(seed), greedy, eos_ids, 0), expected)


def test_parity_survives_a_weight_update_and_long_prompts() -> None:
    model = lively("qwen2")
    greedy, engine = Sampling(6, temperature=0.0), DecodeEngine()
    long = [*prompts(3, count=3, longest=20), [2, 3, 4, 5] * 75]
    before = engine.generate(model, long, greedy, [1], 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    after = engine.generate(model, long, greedy, [1], 0)
    assert not same(before, after)
    assert same(after, GenerateEngine().generate(model, long, greedy, [1], 0))


def test_a_row_does_not_depend_on_when_its_neighbours_end() -> None:
    model = make_model()
    given = prompts(1, count=8)
    free = [_seeded(model, given, eos_ids=[]), _seeded(model, given, eos_ids=[2, 3, 4, 5, 6])]
    for whole, ended in zip(free[0].completions(), free[1].completions(), strict=True):
        assert whole[: len(ended)] == ended
    assert free[1].lengths_B.tolist() != free[0].lengths_B.tolist()


def _seeded(model: PreTrainedModel, given: list[list[int]], eos_ids: list[int]) -> Rollout:
    torch.manual_seed(11)
    return DecodeEngine().generate(model, given, Sampling(10), eos_ids, 0)


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
def test_draw_follows_the_distribution(sampling: Sampling, kept: list[int]) -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf, 0.5])
    count = 100_000
    ids = draw(logits.repeat(count, 1), sampling, torch.rand(count))
    expected = torch.zeros(5)
    expected[kept] = (logits[kept] / sampling.temperature).softmax(-1)
    seen = ids.bincount(minlength=5)
    assert seen[expected == 0].sum() == 0
    chi_square = ((seen - count * expected).square() / (count * expected))[expected > 0].sum()
    assert chi_square < 20  # 3 degrees of freedom: p = .0002


def test_draw_never_yields_an_impossible_token_at_the_ends() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(2, 1)
    ends = torch.tensor([0.0, 1.0 - 2**-24])
    assert draw(logits, Sampling(1), ends).tolist() == [1, 2]
