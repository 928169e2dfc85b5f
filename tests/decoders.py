"""Tiny decoders of many families with room for long prompts, for whatever draws completions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import WORDS, make_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sdft.rollout import Rollout, Sampling

SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
MIXED = ["sliding_attention", "full_attention"]


def gpt2() -> PreTrainedModel:
    ids = {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(**ids, n_embd=32, n_layer=2, n_head=2, n_positions=512))


def gemma3() -> PreTrainedModel:
    config = Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=8, layer_types=MIXED)
    return Gemma3ForCausalLM(config)


def gemma2() -> PreTrainedModel:
    config = Gemma2Config(**SHAPE, head_dim=16, sliding_window=8, layer_types=MIXED)
    return Gemma2ForCausalLM(config)  # soft-capped scores: eager attention


DIRECT: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: make_model(max_position_embeddings=512),
    "llama3": lambda: make_model(
        max_position_embeddings=512,
        attention_bias=True,
        mlp_bias=True,
        hidden_act="gelu",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
}
BY_FORWARD: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": gpt2,
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SHAPE, head_dim=16)),
    "gemma2": gemma2,
    "gemma3": gemma3,
    "sliding mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)),
}
MODELS = {**DIRECT, **BY_FORWARD}
NONE: list[int] = []
SOME, MANY, ALL = [1, 5, 7, 9], list(range(2, 10)), list(range(len(WORDS)))


def lively(name: str) -> PreTrainedModel:
    """Weights large enough that greedy completions differ from one another; fp64."""
    torch.manual_seed(0)
    # Eager attention to nothing but padding is NaN in fp64.
    model = MODELS[name]().to(torch.float32 if name == "gemma2" else torch.float64).eval()
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
        torch.equal(first.ids_BT, second.ids_BT)
        and torch.equal(first.mask_BT, second.mask_BT)
        and torch.equal(first.truncated_B, second.truncated_B)
    )


def greedy(tokens: int) -> Sampling:
    return Sampling(tokens, temperature=0.0)
