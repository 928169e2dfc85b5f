"""Attention inside segments: what plain attention is, sequence by sequence, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdft.segments import QKV, AttentionSettings, Segments, segment_attention

LENGTHS = (2, 5, 5, 1, 9)
SETTINGS = {
    "plain": AttentionSettings(),
    "scaled": AttentionSettings(scaling=0.7),
    "window": AttentionSettings(window=3),
    "itself alone": AttentionSettings(window=1),
    "wide window": AttentionSettings(window=50),
    "capped": AttentionSettings(softcap=2.0),
    "capped window": AttentionSettings(scaling=0.5, window=4, softcap=2.0),
}


def make_qkv(heads: int = 4, key_heads: int = 2, value_width: int = 8) -> QKV:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    shapes = [(tokens, heads, 8), (tokens, key_heads, 8), (tokens, key_heads, value_width)]
    return QKV(*(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes))


def by_hand(qkv: QKV, segments: Segments, settings: AttentionSettings) -> Tensor:
    """Token by token, head by head."""
    query, key, value = qkv
    scaling = settings.scaling or query.shape[-1] ** -0.5
    sharing = query.shape[1] // key.shape[1]
    output = []
    for start, length in zip(segments.starts.tolist(), segments.lengths, strict=False):
        for t in range(start, start + length):
            first = max(start, t + 1 - settings.window) if settings.window else start
            heads = []
            for head in range(query.shape[1]):
                scores = key[first : t + 1, head // sharing] @ query[t, head] * scaling
                if settings.softcap:
                    scores = settings.softcap * torch.tanh(scores / settings.softcap)
                heads.append(scores.softmax(0) @ value[first : t + 1, head // sharing])
            output.append(torch.stack(heads))
    return torch.stack(output)


def gradients(output: Tensor, inputs: QKV) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((output * weights).sum(), list(inputs))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", [(4, 4, 8), (4, 2, 8), (4, 1, 6)], ids=str)
def test_segments_attend_as_written_by_hand(
    settings: AttentionSettings, shape: tuple[int, int, int]
) -> None:
    qkv, segments = make_qkv(*shape), Segments.of(LENGTHS)
    found, expected = (
        segment_attention(qkv, segments, settings),
        by_hand(qkv, segments, settings),
    )
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for a, b in zip(gradients(found, qkv), gradients(expected, qkv), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_segment_sees_no_other(settings: AttentionSettings) -> None:
    qkv, segments = make_qkv(), Segments.of(LENGTHS)
    before = segment_attention(qkv, segments, settings)
    first, end = segments.starts[1], segments.starts[2]
    other = qkv.map(lambda tensor: tensor.detach().clone())
    for tensor in other:
        tensor[first:end] += 100
    after = segment_attention(other, segments, settings)
    same = (before == after).flatten(1).all(-1)
    assert same[:first].all()
    assert same[end:].all()
    assert not same[first:end].any()


def test_dropped_weights_are_dropped() -> None:
    qkv, segments = make_qkv(), Segments.of(LENGTHS)
    for softcap in (None, 2.0):
        output = segment_attention(qkv, segments, AttentionSettings(softcap=softcap, dropout=0.999))
        assert (output == 0).double().mean() > 0.9


def test_segments_know_their_places() -> None:
    segments = Segments.of((1, 3, 3, 2))
    assert segments.starts.tolist() == [0, 1, 4, 7, 9]
    assert segments.starts.dtype == torch.int32
    assert segments.positions_N.tolist() == [0, 0, 1, 2, 0, 1, 2, 0, 1]
    assert segments.groups == [(1, 1), (2, 3), (1, 2)]
    assert (segments.tokens, segments.longest) == (9, 3)
