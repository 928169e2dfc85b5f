"""Next-token logits from a known decoder's own weights, without its `forward`.

A decode step of a small model is mostly what surrounds the arithmetic: masks, modules, attention
kernels made for many queries. This one does the arithmetic of Llama-, Mistral-, Qwen2- and
Qwen3-type decoders and nothing else. It holds references to the model's parameters, no copies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from sdft.adapters import folded
from sdft.batch import pad
from sdft.flat_sharding import inner
from sdft.forward import Forward, ModelForward, prefill_limits, sub_batches
from sdft.known import is_known, is_plain
from sdft.row_cache import RowCache

log = logging.getLogger(__name__)

Function = Callable[[Tensor], Tensor]
Turn = tuple[Tensor, Tensor]
"""Cosines of the rotary position embedding, and sines with their signs."""

_VERDICTS: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_PROBE = 16  # tokens
_SILU = (nn.SiLU, type(ACT2FN["silu"]))


def runs_directly(model: PreTrainedModel, prompt: Sequence[int]) -> bool:
    """Whether `DirectForward` may run the model: a known one, whose logits it has reproduced.

    Args:
        model: In evaluation mode.
        prompt: The logits are compared after its first tokens, once per model.
    """
    if not is_known(model):
        return False
    if model not in _VERDICTS:
        probe = [list(prompt[:_PROBE])]
        expected_1V = ModelForward(model, 0).prefill(probe).float()
        found_1V = DirectForward(model, 1).prefill(probe).float()
        furthest = float((found_1V - expected_1V).abs().max() / expected_1V.abs().max())
        exact = model.dtype.itemsize >= 4 and not torch.is_autocast_enabled(model.device.type)
        _VERDICTS[model] = furthest < (1e-3 if exact else 5e-2)
        if not _VERDICTS[model]:
            log.warning(
                "rollouts go through the forward pass of %s: its logits differ by %.2g of their "
                "size from those of its known parts",
                type(model).__name__,
                furthest,
            )
    return _VERDICTS[model]


class DirectForward(Forward):
    """Rows under way in a model for which `sdft.known.is_known` holds.

    Args:
        model: In evaluation mode.
        new_tokens: Tokens that each row gets at most.
    """

    def __init__(self, model: PreTrainedModel, new_tokens: int) -> None:
        decoder: Any = model.model
        self.embed: Function = partial(F.embedding, weight=decoder.embed_tokens.weight)
        self.blocks = [_Block(inner(layer)) for layer in decoder.layers]
        self.norm, self.head = _norm(decoder.norm), _linear(model.lm_head)
        self.rotary = decoder.rotary_emb
        self.key_heads = model.config.num_key_value_heads
        self.new_tokens = new_tokens
        weight = decoder.embed_tokens.weight
        kind = weight.device.type
        cast = torch.is_autocast_enabled(kind)
        self.like = weight.new_empty(0, dtype=torch.get_autocast_dtype(kind) if cast else None)
        self.capturable = kind == "cuda"
        called = isinstance(self.head, nn.Module)
        self.stateless = not called and not any(block.calls_modules for block in self.blocks)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read all but the last tokens for their keys and values alone, then step over those."""
        lengths = [len(prompt) - 1 for prompt in prompts]
        self._make_table(max(lengths) + 1 + self.new_tokens)
        shape = (len(self.blocks), self.key_heads, self.blocks[0].size)
        self.cache = RowCache(shape, lengths, self.new_tokens, self.like, fixed=self.capturable)
        for rows in sub_batches(lengths, *prefill_limits(self.like.device)):
            if lengths[rows[0]] > 0:
                self._read(rows, [prompts[row][:-1] for row in rows])
        self.reserve()
        last = [prompt[-1] for prompt in prompts]
        return self.step(torch.tensor(last, device=self.like.device))

    def _make_table(self, positions: int) -> None:
        """Rotation of each position, `[P, 2, D]`: the cosines, the sines with their signs."""
        position_1P = torch.arange(positions, device=self.like.device)[None]
        cos_1PD, sin_1PD = self.rotary(self.embed(position_1P[:, :1]), position_1P)
        half = sin_1PD.shape[-1] // 2
        signed_1PD = torch.cat((-sin_1PD[..., :half], sin_1PD[..., half:]), dim=-1)
        self.table_P2D = torch.stack((cos_1PD[0], signed_1PD[0]), dim=1)

    def _read(self, rows: list[int], prompts: list[Sequence[int]]) -> None:
        # Padded on the right, so that causal attention needs no mask.
        ids_RT, _ = pad(prompts, 0, "right", self.like.device)
        rows_R = torch.tensor(rows, device=self.like.device)
        cos_T1D, sin_T1D = self.table_P2D[: ids_RT.shape[1], :, None].unbind(1)
        turn = (cos_T1D, sin_T1D)
        states_RTD = self.embed(ids_RT)
        for layer, block in enumerate(self.blocks):
            inner_RTD = block.input_norm(states_RTD)
            keys_RTKD, values_RTKD = block.keys_values(inner_RTD, turn)
            self.cache.store(layer, rows_R, keys_RTKD, values_RTKD)
            if layer + 1 < len(self.blocks):
                queries_RTHD = block.queries(inner_RTD, turn)
                context_RTD = _causal(queries_RTHD, keys_RTKD, values_RTKD, block.scale)
                states_RTD = block.finish(states_RTD, context_RTD)

    def reserve(self) -> bool:
        """Make room for the next step."""
        return self.cache.reserve()

    def step(self, ids_R: Tensor) -> Tensor:
        """Append one token to every row."""
        self.cache.begin_step()
        table_R2D = self.table_P2D.index_select(0, self.cache.position_R)
        cos_R11D, sin_R11D = table_R2D[:, :, None, None].unbind(1)
        turn = (cos_R11D, sin_R11D)
        states_R1D = self.embed(ids_R[:, None])
        for layer, block in enumerate(self.blocks):
            inner_R1D = block.input_norm(states_R1D)
            self.cache.append(layer, *block.keys_values(inner_R1D, turn))
            queries_R1HD = block.queries(inner_R1D, turn)
            context_R1D = self.cache.attend(layer, queries_R1HD, block.scale)
            states_R1D = block.finish(states_R1D, context_R1D)
        self.cache.end_step()
        return self.head(self.norm(states_R1D))[:, -1]

    def select(self, rows_K: Tensor) -> None:
        """Keep these rows."""
        self.cache.select(rows_K)


class _Block:
    """One decoder layer as functions on its own parameters."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.size, self.scale = attention.head_dim, attention.scaling
        self.input_norm = _norm(layer.input_layernorm)
        self.inner_norm = _norm(layer.post_attention_layernorm)
        self.query, self.key = _linear(attention.q_proj), _linear(attention.k_proj)
        self.value, self.output = _linear(attention.v_proj), _linear(attention.o_proj)
        self.gate, self.up, self.down = map(_linear, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.calls_modules = any(isinstance(part, nn.Module) for part in vars(self).values())
        self.activation: Function = F.silu if type(mlp.act_fn) in _SILU else mlp.act_fn
        normed = hasattr(attention, "q_norm")
        self.query_norm = _norm(attention.q_norm) if normed else _same
        self.key_norm = _norm(attention.k_norm) if normed else _same

    def queries(self, inner_RTD: Tensor, turn: Turn) -> Tensor:
        """`[R, T, H, D]`, rotated."""
        return _rotate(self.query_norm(self._heads(self.query(inner_RTD))), turn)

    def keys_values(self, inner_RTD: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """`[R, T, K, D]` each, the keys rotated."""
        keys_RTKD = _rotate(self.key_norm(self._heads(self.key(inner_RTD))), turn)
        return keys_RTKD, self._heads(self.value(inner_RTD))

    def _heads(self, states: Tensor) -> Tensor:
        return states.reshape(*states.shape[:2], -1, self.size)

    def finish(self, states_RTD: Tensor, context_RTD: Tensor) -> Tensor:
        """Add the attention's output, then the perceptron's."""
        states_RTD = states_RTD + self.output(context_RTD)
        inner_RTD = self.inner_norm(states_RTD)
        return states_RTD + self.down(self.activation(self.gate(inner_RTD)) * self.up(inner_RTD))


def _linear(module: Any) -> Function:
    # Whatever else stands in a linear layer's place (quantised weights) is called.
    if type(module) is nn.Linear and is_plain(module):
        return partial(F.linear, weight=module.weight, bias=module.bias)
    weight = folded(module)
    return module if weight is None else partial(F.linear, weight=weight, bias=module.bias)


def _norm(module: Any) -> Function:
    return partial(_rms_norm, weight=module.weight, eps=module.variance_epsilon)


def _same(states: Tensor) -> Tensor:
    return states


def _rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As transformers computes it: in fp32, then in the weight's precision."""
    if states.dtype == weight.dtype == torch.float32:
        return F.rms_norm(states, weight.shape, weight, eps)
    return weight * F.rms_norm(states.float(), weight.shape, None, eps).to(states.dtype)


def _rotate(heads: Tensor, turn: Turn) -> Tensor:
    """Rotary position embedding of heads `[R, T, H, D]`."""
    cos, sin = turn
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def _causal(queries_RTHD: Tensor, keys_RTKD: Tensor, values_RTKD: Tensor, scale: float) -> Tensor:
    """Causal attention within each row, `[R, T, H · D]`."""
    shared = queries_RTHD.shape[2] // keys_RTKD.shape[2]
    keys_RHTD = keys_RTKD.repeat_interleave(shared, dim=2).transpose(1, 2)
    values_RHTD = values_RTKD.repeat_interleave(shared, dim=2).transpose(1, 2)
    context_RHTD = F.scaled_dot_product_attention(
        queries_RTHD.transpose(1, 2), keys_RHTD, values_RHTD, is_causal=True, scale=scale
    )
    return context_RHTD.transpose(1, 2).flatten(2)
