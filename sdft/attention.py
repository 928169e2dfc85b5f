"""The one place that chooses how packed sequences attend, and that has a model attend so.

Sequences that lie end to end in one row must not see each other. For one forward pass, `packed`
switches a model to an attention of ours, registered with transformers under `NAME`:

* flash attention on CUDA in half precision (autocast's included): torch's `varlen_attn`, else an
  installed flash-attn;
* else one scaled dot product per group of equal length (`sdft.segments`).

What a layer asks of its attention that neither can give raises `NotPackable`; padded sequences
(`sdft.packing`) are the reference for everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sdft import flash
from sdft.segments import QKV, AttentionSettings, Segments, segment_attention

NAME = "sdft_packed"
"""Our attention's name among transformers' implementations."""

_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")  # transformers', torch's wrapper
_UNKNOWN = ("s_aux", "position_bias", "alibi")  # sinks and biases of the scores


class NotPackable(RuntimeError):
    """The model attends in a way that packed sequences cannot follow here."""


class PackedPass:
    """One forward pass of a model over packed sequences.

    Attributes:
        segments: The sequences.
        calls: How many attention layers came through here so far.
    """

    def __init__(self, model: PreTrainedModel, segments: Segments) -> None:
        self.segments = segments
        self.calls = 0
        self._model = model
        self._configs = list(_configs(model))

    @contextmanager
    def attending(self) -> Iterator[None]:
        """The model attends inside the segments."""
        before = [config._attn_implementation_internal for config in self._configs]
        token = _PASS.set(self)
        try:
            for config in self._configs:
                config._attn_implementation_internal = NAME
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = name
            _PASS.reset(token)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Layers that the backward pass computes again will attend inside the segments again."""
        before = [
            (module, name, vars(module)[name])
            for module in self._model.modules()
            for name in _CHECKPOINTS
            if name in vars(module)
        ]
        try:
            for module, name, checkpoint in before:
                setattr(module, name, self._reentering(checkpoint))
            yield
        finally:
            for module, name, checkpoint in before:
                setattr(module, name, checkpoint)

    def _reentering(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointed(layer: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
            def again(*inputs: Any, **options: Any) -> Any:
                with self.attending():
                    return layer(*inputs, **options)

            return checkpoint(again, *inputs, **options)

        return checkpointed


_PASS: ContextVar[PackedPass | None] = ContextVar("sdft_packed_pass", default=None)


@contextmanager
def packed(model: PreTrainedModel, segments: Segments) -> Iterator[PackedPass]:
    """Have `model` attend inside `segments` in this context, and in the backward pass behind it.

    The model's own attention is restored on leaving, also after an exception. Contexts nest; one
    model must not be in use by another thread meanwhile.

    Args:
        model: Runs one row of N tokens, without an attention mask and a cache.
        segments: The sequences of the N tokens.

    Yields:
        The pass, which counts the attention layers that came through.
    """
    this = PackedPass(model, segments)
    with ExitStack() as stack:
        if torch.is_grad_enabled():
            stack.enter_context(this.recomputing())
        stack.enter_context(this.attending())
        yield this


def _configs(model: PreTrainedModel) -> Iterator[Any]:
    """Every configuration from which a part of the model reads its attention, once."""
    configs = {id(config): config for m in model.modules() if (config := vars(m).get("config"))}
    return (c for c in configs.values() if hasattr(c, "_attn_implementation_internal"))


# ---------------------------------------------------------------- what a layer calls


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer inside the current segments, as transformers calls it.

    Args:
        module: The layer.
        query: `[1, heads, N, width]`.
        key: `[1, key heads, N, width]`.
        value: `[1, key heads, N, value width]`.
        attention_mask: Must be None.
        dropout: Probability that a weight is dropped.
        scaling: Factor of the scores.
        sliding_window: How many tokens a query sees.
        softcap: Cap of the scores.
        is_causal: Must not be false.
        options: What else the architecture passes on; must not change the scores.

    Returns:
        `[1, N, heads, value width]`, and no weights.

    Raises:
        NotPackable: The layer asks for something else.
    """
    this = _PASS.get()
    assert this is not None, f"attention {NAME!r} outside of sdft.attention.packed"
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _require(causal, "its attention is not causal")
    _require(attention_mask is None, "it builds an attention mask of its own")
    _require(all(options.get(name) is None for name in _UNKNOWN), "its scores have a bias or sinks")
    qkv = QKV(query, key, value)
    for tensor in qkv:
        _require(
            tensor.shape[0] == 1 and tensor.shape[2] == this.segments.tokens,
            "a layer attends to something else than the sequence",
        )
    _require(_knows_its_window(module, sliding_window), "a layer does not say what its window is")
    this.calls += 1
    settings = AttentionSettings(scaling, sliding_window, softcap, dropout)
    qkv = qkv.map(lambda tensor: tensor.squeeze(0).transpose(0, 1))
    return _attend(qkv, this.segments, settings)[None], None


def _require(condition: object, otherwise: str) -> None:
    if not condition:
        raise NotPackable(otherwise)


def _knows_its_window(module: nn.Module, window: int | None) -> bool:
    types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if types is None or index is None:
        return True
    return bool(types[index] != "sliding_attention" or window is not None)


def _no_mask(*args: Any, **options: Any) -> None:
    """The segments say who sees whom."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)

# ---------------------------------------------------------------- the choice


def _attend(qkv: QKV, segments: Segments, settings: AttentionSettings) -> Tensor:
    chosen = choose(qkv, settings)
    if chosen is None:
        say_once("attention of packed sequences: scaled dot product per group of equal length")
        return segment_attention(qkv, segments, settings)
    kernel, dtype = chosen
    say_once(f"attention of packed sequences: flash attention ({kernel.name})")
    return kernel(qkv.map(lambda tensor: tensor.to(dtype).contiguous()), segments, settings)


def choose(qkv: QKV, settings: AttentionSettings) -> tuple[flash.Kernel, torch.dtype] | None:
    """The flash kernel and the precision it runs in; None: scaled dot products.

    Args:
        qkv: `[N, heads, width]`; the value's width may differ.
        settings: What the layer asks for.
    """
    dtype = flash.half_dtype(qkv.query.device, qkv.query.dtype)
    if dtype is None or not flash.takes(qkv):
        return None
    able = (kernel for kernel in flash.kernels() if kernel.can(settings))
    kernel = next(able, None)
    return None if kernel is None else (kernel, dtype)


@cache
def say_once(message: str) -> None:
    """Log each message once."""
    rank_zero_info(message)
