"""Which models `sdft.direct` may run: those whose every part is exactly what it expects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from transformers import PreTrainedModel

from sdft.flat_sharding import inner
from sdft.kv_cache import attention_windows
from sdft.sharding import is_hook_of_sharding, original

_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_ROTATIONS = ("default", "linear", "llama3", "yarn")  # the others change with the length
_ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def is_known(model: PreTrainedModel) -> bool:
    """Whether the model is one of ours through and through.

    Linear layers may be anything, for they are called. What is not called must be plain: of the
    class that transformers or torch defines, without hooks or a forward pass of its own.
    """
    config: Any = model.config
    if config.model_type not in _FAMILIES or not _is(model, config.model_type, "ForCausalLM"):
        return False
    windows = attention_windows(config)
    return (
        all(is_plain(part) and _is(part, config.model_type, name) for part, name in _parts(model))
        and not global_hooks._global_forward_hooks
        and not global_hooks._global_forward_pre_hooks
        and windows is not None
        and not any(windows)
        and config._attn_implementation in _ATTENTIONS
        and config.rope_parameters["rope_type"] in _ROTATIONS
    )


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module would do what its class says, on ordinary tensors."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return (
        all(map(is_hook_of_sharding, hooks))  # what these do is done: the weights are whole
        and "forward" not in vars(module)
        and all(type(p) in (nn.Parameter, Tensor) for p in module.parameters(recurse=False))
    )


def _parts(model: Any) -> Iterator[tuple[nn.Module, str]]:
    """The modules that are not called, with the names of their classes."""
    decoder = model.model
    yield from ((model, "ForCausalLM"), (decoder, "Model"), (decoder.norm, "RMSNorm"))
    yield from ((decoder.embed_tokens, "Embedding"), (decoder.rotary_emb, "RotaryEmbedding"))
    for layer in map(inner, decoder.layers):
        yield from ((layer, "DecoderLayer"), (layer.self_attn, "Attention"), (layer.mlp, "MLP"))
        yield from ((layer.input_layernorm, "RMSNorm"), (layer.post_attention_layernorm, "RMSNorm"))
        if hasattr(layer.self_attn, "q_norm"):
            yield from ((layer.self_attn.q_norm, "RMSNorm"), (layer.self_attn.k_norm, "RMSNorm"))


def _is(module: nn.Module, model_type: str, name: str) -> bool:
    """Whether the module's class is the family's own of that name, or torch's embedding."""
    kind = original(module)
    if name == "Embedding":
        return kind is nn.Embedding and module.max_norm is None
    home = f"transformers.models.{model_type}.modeling_{model_type}"
    return (kind.__module__, kind.__qualname__) == (home, _FAMILIES[model_type] + name)
