"""Tiny models of more architectures than conftest's, for what must hold in all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from conftest import FAMILIES, IDS
from transformers import PreTrainedModel

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
WINDOW = 4  # shorter than the tests' sequences


def make(name: str, config: str | None = None, **changes: Any) -> PreTrainedModel:
    """A model by the name of its classes, `<name>ForCausalLM` and `<name>Config`."""
    torch.manual_seed(0)
    settings = getattr(transformers, config or f"{name}Config")(**IDS | SHAPE | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(settings)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def make_qwen3(**changes: Any) -> PreTrainedModel:
    return make("Qwen3", **{"head_dim": 8} | changes)


def make_gemma(**changes: Any) -> PreTrainedModel:
    return make("Gemma", **{"head_dim": 8} | changes)


def make_gemma2(**changes: Any) -> PreTrainedModel:
    """Caps scores and logits; every other layer has a window."""
    shape = {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
    return make("Gemma2", **shape | changes)


def make_gemma3(**changes: Any) -> PreTrainedModel:
    """Windows with positions of their own; norms of queries and keys."""
    shape = {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return make("Gemma3", config="Gemma3TextConfig", **shape | changes)


def make_mistral(**changes: Any) -> PreTrainedModel:
    """A window in every layer."""
    return make("Mistral", **{"sliding_window": WINDOW} | changes)


def make_deepseek(**changes: Any) -> PreTrainedModel:
    """Values narrower than keys; a mixture of experts (no fp64)."""
    shape = {
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    return make("DeepseekV3", **shape | changes)


PACKABLE: dict[str, Callable[..., PreTrainedModel]] = {
    **FAMILIES,
    "qwen3": make_qwen3,
    "gemma": make_gemma,
    "gemma2": make_gemma2,
    "gemma3": make_gemma3,
    "mistral": make_mistral,
}
