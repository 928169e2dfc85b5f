"""Attention of sequences that lie end to end: one scaled dot product per group of equal length.

Neighbours of equal length are one rectangular batch, a view without any copy, so whoever lays the
sequences out sorts them by length. Nothing is padded: a short sequence pays nothing for a long one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention, softmax

HALVES = (torch.bfloat16, torch.float16)


class QKV(NamedTuple):
    """Queries, keys and values of one attention layer; one key head may serve several queries'."""

    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def shared(self) -> bool:
        """Whether a key head serves several heads."""
        return self.query.shape[-2] != self.key.shape[-2]

    def map(self, function: Callable[[Tensor], Tensor]) -> QKV:
        """The same function of each."""
        return QKV(*(function(tensor) for tensor in self))

    def repeated(self) -> QKV:
        """Key and value heads, the last but one axis, until each head of the query has its own."""
        times = self.query.shape[-2] // self.key.shape[-2]
        if times == 1:
            return self
        key, value = (tensor.repeat_interleave(times, dim=-2) for tensor in (self.key, self.value))
        return QKV(self.query, key, value)


@dataclass(frozen=True, eq=False)
class Segments:
    """Where sequences that lie end to end begin and end.

    Attributes:
        lengths: Tokens of each sequence, in the order in which they lie.
        starts: `[sequences + 1]`, int32: the running sum of the lengths, from 0 to N.
    """

    lengths: tuple[int, ...]
    starts: Tensor

    @classmethod
    def of(cls, lengths: Iterable[int], device: torch.device | str = "cpu") -> Segments:
        """Segments of these lengths."""
        lengths = tuple(lengths)
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return cls(lengths, starts)

    @cached_property
    def tokens(self) -> int:
        """All tokens, N."""
        return sum(self.lengths)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @cached_property
    def positions_N(self) -> Tensor:
        """Each token's place in its own sequence, from 0."""
        starts, device = self.starts.long(), self.starts.device
        begins_N = starts[:-1].repeat_interleave(starts.diff(), output_size=self.tokens)
        return torch.arange(self.tokens, device=device) - begins_N

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """Neighbours of equal length, as (how many, their length)."""
        return [(len(list(rows)), length) for length, rows in groupby(self.lengths)]


@dataclass(frozen=True)
class AttentionSettings:
    """What one attention layer asks for, beside causality.

    Attributes:
        scaling: Factor of the scores; None: 1/√(head width).
        window: How many tokens a query sees, itself included; None: all before it.
        softcap: Scores become softcap·tanh(scores / softcap).
        dropout: Probability that a weight is dropped.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0

    def windowed(self, length: int) -> bool:
        """Whether the window hides anything in a sequence of this length."""
        return self.window is not None and length > self.window

    def mask_TT(self, length: int, device: torch.device) -> Tensor:
        """`[T, T]`, true where a query (row) sees a key (column)."""
        seen_TT = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return seen_TT if self.window is None else seen_TT.triu(1 - self.window)


def segment_attention(qkv: QKV, segments: Segments, settings: AttentionSettings) -> Tensor:
    """Causal attention inside each segment.

    Args:
        qkv: `[N, heads, width]`; the value's width may differ.
        segments: The sequences of the N tokens.
        settings: Scale, window, softcap, dropout.

    Returns:
        `[N, heads, value width]`.
    """
    attend = _dot_product if settings.softcap is None else _softcapped
    sizes = [count * length for count, length in segments.groups]
    parts = zip(*(tensor.split(sizes) for tensor in qkv), strict=True)
    outputs = [
        attend(QKV(*(tensor.unflatten(0, group) for tensor in part)), settings)
        for group, part in zip(segments.groups, parts, strict=True)
    ]
    return torch.cat([output.flatten(0, 1) for output in outputs])


def _dot_product(qkv: QKV, settings: AttentionSettings) -> Tensor:
    """torch's attention of `[count, length, heads, width]`."""
    length, device = qkv.query.shape[1], qkv.query.device
    windowed = settings.windowed(length)
    # CUDA has fast kernels with shared key heads in half precision alone, and without a mask.
    fused = device.type == "cpu" or (qkv.query.dtype in HALVES and not windowed)
    query, key, value = (qkv if fused else qkv.repeated()).map(lambda x: x.transpose(1, 2))
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=settings.mask_TT(length, device) if windowed else None,
        dropout_p=settings.dropout,
        is_causal=not windowed,
        scale=settings.scaling,
        enable_gqa=qkv.shared and fused,
    )
    return output.transpose(1, 2)


def _softcapped(qkv: QKV, settings: AttentionSettings) -> Tensor:
    """Written out, for torch's attention caps no scores."""
    assert settings.softcap is not None
    query, key, value = qkv.repeated().map(lambda x: x.transpose(1, 2))
    scaling = query.shape[-1] ** -0.5 if settings.scaling is None else settings.scaling
    scores = settings.softcap * (query @ key.mT * scaling / settings.softcap).tanh()
    seen_TT = settings.mask_TT(query.shape[2], query.device)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = softmax(scores.masked_fill(~seen_TT, -torch.inf), dim=-1, dtype=dtype)
    output = dropout(weights.to(value.dtype), settings.dropout) @ value
    return output.transpose(1, 2)
