"""Next-token logits of a known decoder on a CPU, for which its weights are laid out anew.

A decode step has a few rows, so that what counts is how weights are read and how many operations
there are: with `sdft.fused_weights` four products of weights per layer, and a dozen small ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from sdft.aligned_cache import AlignedCache
from sdft.batch import pad
from sdft.forward import Forward, prefill_limits, sub_batches
from sdft.fused_weights import BlockWeights, Norm, can_be_copied, head_blocks
from sdft.sampler import BLOCK

PAYS_FROM = 16
"""New tokens from which the copies pay; they take as long as some ten steps gain."""
MOST_BYTES = 2**30
"""Weights beyond which memory matters more than time."""
_SILU = (nn.SiLU, type(ACT2FN["silu"]))


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether `FusedForward` can run the model: on a CPU, in full precision, of plain layers.

    Args:
        model: `sdft.known.is_known` holds.
    """
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and can_be_copied(model)
    )


def fusing_pays(model: PreTrainedModel, new_tokens: int) -> bool:
    """Whether copies of the weights are soon worth their time, and small.

    Args:
        model: Any.
        new_tokens: Tokens that each row gets at most.
    """
    size = sum(weight.numel() * weight.itemsize for weight in model.parameters())
    return new_tokens >= PAYS_FROM and size <= MOST_BYTES


class FusedForward(Forward):
    """Rows under way in a known model that `can_fuse` accepts; its weights do not change meanwhile.

    Shapes: R rows, T tokens, N rows or tokens end to end, D hidden, H query heads, K key-value
    heads, S head size, J = S / 2. Logits come in blocks, `[R, blocks, BLOCK]`.

    Args:
        model: In evaluation mode.
        new_tokens: Tokens that each row gets at most.
    """

    capturable = False
    stateless = True

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, new_tokens: int) -> None:
        decoder: Any = model.model
        self.embedding_VD: Tensor = decoder.embed_tokens.weight.detach()
        self.blocks = [_Block(layer) for layer in decoder.layers]
        self.rotary, self.new_tokens = decoder.rotary_emb, new_tokens
        self.head_BDW, self.slack = head_blocks(model), Norm.of(decoder.norm).slack
        self.rest = len(self.embedding_VD) % BLOCK

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read all but the last tokens for their keys and values alone, then step over those."""
        lengths = [len(prompt) - 1 for prompt in prompts]
        self._make_table(max(lengths) + 1 + self.new_tokens)
        block = self.blocks[0]
        shape = (len(self.blocks), block.key_heads, block.size)
        self.cache = AlignedCache(shape, lengths, self.new_tokens, self.embedding_VD)
        for rows in sub_batches(lengths, *prefill_limits(self.embedding_VD.device)):
            if lengths[rows[0]] > 0:
                self._read(rows, [prompts[row][:-1] for row in rows])
        self._begin()
        return self.step(torch.tensor([prompt[-1] for prompt in prompts]))

    def _make_table(self, positions: int) -> None:
        """Rotation of each position, as complex numbers."""
        cos_1PS, sin_1PS = self.rotary(self.embedding_VD[:1], torch.arange(positions)[None])
        half = cos_1PS.shape[-1] // 2
        self.table_PJ = torch.complex(cos_1PS[0, :, :half], sin_1PS[0, :, :half])

    def _read(self, rows: list[int], prompts: list[Sequence[int]]) -> None:
        # Padded on the right, so that causal attention needs no mask.
        ids_RT, _ = pad(prompts, 0, "right", self.embedding_VD.device)
        turn_N1J = self.table_PJ[: ids_RT.shape[1], None].repeat(len(rows), 1, 1)
        states_ND = self.embedding_VD[ids_RT.view(-1)]
        for layer, block in enumerate(self.blocks):
            heads = block.heads(states_ND, turn_N1J)
            queries, keys, values = (part.unflatten(0, ids_RT.shape) for part in heads)
            self.cache.store(layer, rows, keys, values)
            if layer + 1 < len(self.blocks):
                block.finish(states_ND, _causal(queries, keys, values))

    def _begin(self) -> None:
        """Places and a buffer for the rows that there are."""
        self.position_R = self.cache.position_R
        # Large enough for the system to hand out anew each time, page by page.
        room = (len(self.head_BDW), len(self.position_R), BLOCK)
        self.logits_BRW = self.head_BDW.new_empty(room)

    def reserve(self) -> bool:
        """There is room for all tokens that may come."""
        return False

    def step(self, ids_R: Tensor) -> Tensor:
        """Append one token to every row."""
        states_RD = self.embedding_VD[ids_R]
        turn_R1J = self.table_PJ[self.position_R][:, None]
        for layer, block in enumerate(self.blocks):
            queries_RHS, keys_RKS, values_RKS = block.heads(states_RD, turn_R1J)
            self.cache.append(layer, keys_RKS, values_RKS)
            block.finish(states_RD, self.cache.attend(layer, queries_RHS))
        self.cache.end_step()
        self.position_R += 1
        each_BRD = _normed(states_RD, self.slack).expand(len(self.head_BDW), -1, -1)
        torch.bmm(each_BRD, self.head_BDW, out=self.logits_BRW)
        if self.rest:
            self.logits_BRW[-1, :, self.rest :] = -math.inf
        return self.logits_BRW.transpose(0, 1)

    def select(self, rows_K: Tensor) -> None:
        """Keep these rows."""
        self.cache.select(rows_K)
        self._begin()


class _Block:
    """One layer: its weights, and what is done with them."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.weights = BlockWeights.of(layer)
        self.size = attention.head_dim
        self.query_heads = len(attention.q_proj.weight) // self.size
        self.key_heads = len(attention.k_proj.weight) // self.size
        # In place where it is known to be what torch has.
        silu = type(mlp.act_fn) in _SILU
        self.activation = partial(F.silu, inplace=True) if silu else mlp.act_fn

    def heads(self, states_ND: Tensor, turn_N1J: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[N, H, S]`, scaled, keys and values `[N, K, S]`; the first two rotated."""
        weights = self.weights
        inner_ND = _normed(states_ND, weights.slack)
        if weights.qkv_bias_X is None:
            qkv_NX = torch.mm(inner_ND, weights.qkv_DX)
        else:
            qkv_NX = torch.addmm(weights.qkv_bias_X, inner_ND, weights.qkv_DX)
        heads_NXS = qkv_NX.view(len(qkv_NX), -1, self.size)
        both = self.query_heads + self.key_heads
        turned_NXS = heads_NXS[:, :both]
        if weights.heads_norm is not None:
            weight_XS, slack = weights.heads_norm
            turned_NXS = _normed(turned_NXS, slack).mul_(weight_XS)
        pairs_NXJ = torch.view_as_complex(turned_NXS.unflatten(-1, (-1, 2)))
        queries_NHJ = pairs_NXJ[:, : self.query_heads] * turn_N1J
        keys_NKJ = pairs_NXJ[:, self.query_heads :] * turn_N1J
        queries, keys = (torch.view_as_real(x).flatten(-2) for x in (queries_NHJ, keys_NKJ))
        return queries, keys, heads_NXS[:, both:]

    def finish(self, states_ND: Tensor, context_NX: Tensor) -> None:
        """Add the attention's output, then the perceptron's, in place."""
        weights = self.weights
        states_ND.addmm_(context_NX, weights.output_XD)
        gate_up_NI = torch.mm(_normed(states_ND, weights.inner_slack), weights.gate_up_DI)
        gate_NI, up_NI = gate_up_NI.chunk(2, dim=-1)
        states_ND.addmm_(self.activation(gate_NI).mul_(up_NI), weights.down_ID)


def _normed(states: Tensor, slack: Tensor) -> Tensor:
    """x / √(mean(x²) + epsilon), but for a factor in the weights (`Norm`)."""
    size: Tensor = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    return states / size.hypot_(slack)


def _causal(queries_RTHS: Tensor, keys_RTKS: Tensor, values_RTKS: Tensor) -> Tensor:
    """Causal attention of scaled queries within each row, `[R · T, H · S]`."""
    query, key, value = (x.transpose(1, 2) for x in (queries_RTHS, keys_RTKS, values_RTKS))
    context_RHTS: Tensor = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=1.0, enable_gqa=query.shape[1] != key.shape[1]
    )
    return context_RHTS.transpose(1, 2).flatten(2).flatten(0, 1)
