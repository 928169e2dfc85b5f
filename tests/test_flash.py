"""Flash attention: asked for the same as scaled dot products, in the words of each version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_segments import LENGTHS, SETTINGS, by_hand, make_qkv
from torch import Tensor

from sdft import flash
from sdft.segments import QKV, AttentionSettings, Segments, segment_attention


def varlen_like(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    window: tuple[int, int],
    settings: AttentionSettings,
) -> Tensor:
    """What a flash kernel computes, with its own notion of a window: tokens to the left."""
    assert query.shape[1] % key.shape[1] == 0
    assert window[1] in (0, -1)
    width = None if window[0] < 0 else window[0] + 1
    lengths = Segments.of(starts.diff().tolist())
    changed = AttentionSettings(settings.scaling, width, settings.softcap)
    return by_hand(QKV(query, key, value), lengths, changed)


def as_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    assert window_size != (-1, -1), "not causal"
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert max_q == max_k == cu_seq_q.diff().max()
    assert cu_seq_k is cu_seq_q
    return varlen_like(query, key, value, cu_seq_q, window_size, AttentionSettings(scale))


def as_torch_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    shared = query.shape[1] != key.shape[1]
    assert not shared, "torch 2.11 takes as many key heads as heads"
    more: Any = {"scale": scale, "window_size": window_size}
    return as_torch(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **more)


def as_flash_attn_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    assert causal
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    assert cu_seqlens_k is cu_seqlens_q
    settings = AttentionSettings(softmax_scale, softcap=softcap or None)
    return varlen_like(q, k, v, cu_seqlens_q, window_size, settings)


def as_flash_attn_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
) -> tuple[Tensor, None]:
    assert causal
    assert cu_seqlens_q is not None
    left = -1 if window_size[0] is None else window_size[0]
    settings = AttentionSettings(softmax_scale, softcap=softcap or None)
    return varlen_like(q, k, v, cu_seqlens_q, (left, 0), settings), None


KERNELS: dict[str, Callable[..., Any]] = {
    "torch": as_torch,
    "torch 2.11": as_torch_2_11,
    "flash-attn 2": as_flash_attn_2,
    "flash-attn 4": as_flash_attn_4,
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", KERNELS)
def test_flash_kernels_are_asked_for_the_same(name: str, settings: AttentionSettings) -> None:
    kernel = flash.Kernel.of(name, KERNELS[name])
    assert kernel.can(settings) == (settings.softcap is None or "flash-attn" in name)
    if kernel.can(settings):
        qkv, segments = make_qkv(), Segments.of(LENGTHS)
        expected = segment_attention(qkv, segments, settings)
        torch.testing.assert_close(kernel(qkv, segments, settings), expected, atol=1e-12, rtol=0)


def test_kernels_say_what_they_cannot() -> None:
    kernels = {name: flash.Kernel.of(name, function) for name, function in KERNELS.items()}
    able = [name for name, kernel in kernels.items() if kernel.can(AttentionSettings(dropout=0.1))]
    assert able == ["flash-attn 2"]


def test_the_installed_torch_has_a_kernel() -> None:
    kernel = flash.kernels()[0]
    assert kernel.name == "torch's varlen_attn"
    assert kernel.can(AttentionSettings(window=3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", [(4, 4, 8), (4, 2, 8)], ids=str)
def test_flash_attention_is_segment_attention(
    settings: AttentionSettings, shape: tuple[int, int, int]
) -> None:
    segments = Segments.of(LENGTHS, "cuda")
    qkv = make_qkv(*shape).map(lambda x: x.detach().cuda().bfloat16().requires_grad_())
    exact = qkv.map(lambda x: x.detach().double().requires_grad_())
    able = [kernel for kernel in flash.kernels() if kernel.can(settings)]
    expected = segment_attention(exact, segments, settings)
    for kernel in able:
        found = kernel(qkv, segments, settings)
        torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)
        weights = torch.linspace(-1, 1, found.numel(), device="cuda").view_as(found)
        ours = torch.autograd.grad((found * weights).sum(), list(qkv))
        theirs = torch.autograd.grad((expected * weights).sum(), list(exact), retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, atol=5e-2, rtol=5e-2)
