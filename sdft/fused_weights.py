"""A known decoder's weights, copied and laid out anew for products with few rows.

On a CPU a product of few rows with the transpose of an `[out, in]` weight takes up to twice as long
as one with a transposed copy. What is copied anyway can be merged at no cost: projections that
share an input, the weights of the norm before them, the scale of the attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdft.known import is_plain
from sdft.sampler import BLOCK


class Norm(NamedTuple):
    """An RMS norm as x / hypot(‖x‖, slack), times weights that the next product has taken in.

    Attributes:
        weight_D: √D times the norm's weights.
        slack: `[1, 1]`: √(D · epsilon).
    """

    weight_D: Tensor
    slack: Tensor

    @classmethod
    def of(cls, module: Any) -> Norm:
        """Of a norm of transformers."""
        weight_D: Tensor = module.weight
        root = math.sqrt(len(weight_D))
        slack = weight_D.new_full((1, 1), root * math.sqrt(module.variance_epsilon))
        return cls(weight_D * root, slack)


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """One decoder layer.

    Shapes: D hidden, H query heads, K key-value heads, S head size, I inner width of the
    perceptron. The two halves of each query and key head are interleaved, so that the rotary
    embedding is one product of complex numbers; attention does not depend on the order.

    Attributes:
        qkv_DX: Queries, keys and values, the first norm's weights taken in: `[D, (H + 2K) · S]`.
        qkv_bias_X: None without biases.
        heads_norm: Of queries and keys, its weights `[H + K, S]`; None without one.
        output_XD: The attention's output, `[H · S, D]`.
        gate_up_DI: Both projections, the second norm's weights taken in: `[D, 2I]`.
        down_ID: `[I, D]`.
        slack: Of the first norm.
        inner_slack: Of the second norm.
    """

    qkv_DX: Tensor
    qkv_bias_X: Tensor | None
    heads_norm: Norm | None
    output_XD: Tensor
    gate_up_DI: Tensor
    down_ID: Tensor
    slack: Tensor
    inner_slack: Tensor

    @classmethod
    def of(cls, layer: Any) -> BlockWeights:
        """Copies of a layer's weights."""
        attention, mlp = layer.self_attn, layer.mlp
        first, second = Norm.of(layer.input_layernorm), Norm.of(layer.post_attention_layernorm)
        heads_norm = _heads_norm(attention)
        scale = attention.scaling if heads_norm is None else 1.0  # else the norm has it
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
        size = attention.head_dim
        rows = [
            _interleaved(query.weight, size) * scale,
            _interleaved(key.weight, size),
            value.weight,
        ]
        bias_X = None
        if query.bias is not None:
            biases = [_interleaved(part.bias[:, None], size) for part in (query, key)]
            bias_X = torch.cat([biases[0] * scale, biases[1], value.bias[:, None]]).squeeze(1)
        return cls(
            qkv_DX=_transposed(torch.cat(rows).mul_(first.weight_D)),
            qkv_bias_X=bias_X,
            heads_norm=heads_norm,
            output_XD=_transposed(attention.o_proj.weight),
            gate_up_DI=_transposed(
                torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).mul_(second.weight_D)
            ),
            down_ID=_transposed(mlp.down_proj.weight),
            slack=first.slack,
            inner_slack=second.slack,
        )


def can_be_copied(model: Any) -> bool:
    """Whether all linear layers are plain ones of one type, without biases but those of Qwen2.

    Args:
        model: `sdft.known.is_known` holds.
    """
    bare, projections = [model.lm_head], []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        bare += [attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        projections += [attention.q_proj, attention.k_proj, attention.v_proj]
    linear = [*bare, *projections]
    return (
        all(type(part) is nn.Linear and is_plain(part) for part in linear)
        and all(part.bias is None for part in bare)
        and len({part.bias is None for part in projections}) == 1
        and len({parameter.dtype for parameter in model.parameters()}) == 1
    )


def head_blocks(model: Any) -> Tensor:
    """The LM head, the last norm's weights taken in: `[blocks, D, BLOCK]`, zeros at the end.

    A product per block is quicker than a wide one, and the sampler sums the same blocks.
    """
    weight_VD: Tensor = model.lm_head.weight
    tokens, hidden = weight_VD.shape
    whole, rest = divmod(tokens, BLOCK)
    blocks = weight_VD.new_empty(whole + (rest > 0), hidden, BLOCK)
    norm_D1 = Norm.of(model.model.norm).weight_D[:, None]
    rows_KWD = weight_VD[: whole * BLOCK].view(whole, BLOCK, hidden)
    torch.mul(rows_KWD.transpose(1, 2), norm_D1, out=blocks[:whole])
    if rest:
        blocks[whole, :, rest:] = 0
        torch.mul(weight_VD[-rest:].t(), norm_D1, out=blocks[whole, :, :rest])
    return blocks


def _heads_norm(attention: Any) -> Norm | None:
    """Of queries and keys together, the scale of the attention taken in."""
    if not hasattr(attention, "q_norm"):
        return None
    size = attention.head_dim
    query, key = Norm.of(attention.q_norm), Norm.of(attention.k_norm)
    weights = [
        _interleaved(norm.weight_D[:, None], size).squeeze(1).expand(len(part.weight) // size, size)
        for norm, part in ((query, attention.q_proj), (key, attention.k_proj))
    ]
    return Norm(torch.cat([weights[0] * attention.scaling, weights[1]]), query.slack)


def _interleaved(weight_XD: Tensor, size: int) -> Tensor:
    """Rows of each head in the order 0, S/2, 1, S/2 + 1 …"""
    rows: Tensor = weight_XD.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)
    return rows


def _transposed(weight: Tensor) -> Tensor:
    return weight.t().contiguous()
