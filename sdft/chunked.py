"""The exact divergence from hidden states, a few rows at a time: no `[N, V]` tensor ever exists.

The heads are applied to one chunk of rows, the divergence's gradient with respect to the chunk's
logits is written down in closed form, carried on to hidden states and head, and forgotten. So one
pass, the forward one, gives values and gradients, and the memory is that of a chunk and of the
head's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdft.buckets import check_top_k
from sdft.divergence import check_alpha, check_temperature
from sdft.sweep import Gradients, Head, Sweep, SweepSettings, Wanted

CPU_ROWS, GPU_ROWS = 256, 1024


def chunked_divergence(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_ND: Tensor,
    teacher_weight_VD: Tensor,
    *,
    alpha: float = 0.0,
    temperature: float = 1.0,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    weights_N: Tensor | None = None,
    chunk_size: int | None = None,
    top_k: int | None = None,
) -> Tensor:
    """`token_divergence` of two heads' logits, `hidden @ weight.T + bias`, which never stand whole.

    The student's gradients are taken in the forward pass. The head's one then presumes that the
    upstream gradient is the same for all N tokens, as it is behind `.sum()`; so give a weighted
    mean's weights as `weights_N` and sum. Another upstream gradient is right too: the backward
    pass then goes through the chunks a second time, and so does a second backward pass over a
    retained graph. The hidden states' gradient never needs that.

    Products are computed in the hidden states' type, under autocast in autocast's (fp64 stays), as
    the head itself would; everything behind them, and the sum of the head's gradient, in fp32 (fp64
    for fp64 input). The head's gradient is rounded to the weight's type once, at the end.

    Args:
        student_hidden_ND: `[N, D]`, the student head's input.
        student_weight_VD: `[V, D]`; may be tied to the embedding.
        teacher_hidden_ND: `[N, D']`; the teacher's tensors get no gradient.
        teacher_weight_VD: `[V', D']`. Where V and V' differ, the distributions are those over the
            first min(V, V') tokens, and the gradient of the student's rows behind them is 0.
        alpha: 0 forward KL, 1 reverse KL, between: JSD; see `token_divergence`.
        temperature: Divides the logits of both sides.
        student_bias_V: `[V]`; −inf rules a token out.
        teacher_bias_V: `[V']`.
        softcap: Both sides' logits become softcap·tanh(logits / softcap), before the temperature.
        vocab_size: Only the first so many tokens exist; the heads' further rows are padding.
        weights_N: `[N]`, factors of the tokens' divergences, without a gradient. Tokens of weight 0
            cost nothing and give 0 whatever stands in their rows.
        chunk_size: Rows at once; None: 256 on CPU, 1024 elsewhere. Memory grows with it: 3 (JSD 4,
            softcap 1 more) fp32 tensors of `[chunk_size, V]`.
        top_k: Compare this many tokens one by one and all others as one, the tail, as
            `sdft.losses.bucket_divergence` does: never above the exact value. None: all of them.

    Returns:
        `[N]`, nats, fp32 (fp64 for fp64 input); times `weights_N` if given.

    Raises:
        ValueError: A number out of range or shapes that do not fit together.
        RuntimeError: In a backward pass with `create_graph=True`: there is no second derivative.
    """
    check_alpha(alpha)
    check_temperature(temperature)
    check_top_k(top_k)
    teacher = _checked_head("teacher", teacher_hidden_ND, teacher_weight_VD, teacher_bias_V)
    student = _checked_head("student", student_hidden_ND, student_weight_VD, student_bias_V)
    vocabulary = _common_vocabulary(student, teacher, vocab_size)
    settings = SweepSettings(
        alpha=alpha,
        temperature=temperature,
        softcap=_checked_softcap(softcap),
        vocabulary=vocabulary,
        chunk_size=_checked_chunk_size(chunk_size, student_hidden_ND.device),
        student_dtype=_product_dtype(student_hidden_ND),
        teacher_dtype=_product_dtype(teacher_hidden_ND),
        top_k=None if top_k is None or top_k >= vocabulary else top_k,
    )
    _check_rows(student, teacher, weights_N)
    detached = [None if tensor is None else tensor.detach() for tensor in teacher]
    values_N: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
        settings, torch.is_grad_enabled(), *student, *detached, weights_N
    )
    return values_N


class _Chunked(torch.autograd.Function):
    """Takes the student's hidden states, weight and bias, the teacher's, and the weights."""

    @staticmethod
    def forward(
        ctx: Any, settings: SweepSettings, tracked: bool, *tensors: Tensor | None
    ) -> Tensor:
        wanted = Wanted(*(tracked and needed for needed in ctx.needs_input_grad[2:5]))
        values_N, gradients = _swept(settings, tensors, tensors[-1], wanted)
        if any(wanted):
            ctx.settings, ctx.gradients = settings, gradients
            ctx.save_for_backward(*tensors)
        return values_N

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        # torch's once_differentiable lets this pass where the upstream gradient is a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "chunked_divergence has no second derivative: create_graph=True is not possible "
                "through it, use token_divergence"
            )
        _, weight_VD, bias_V, *_, weights_N = ctx.saved_tensors
        hidden, weight, bias = ctx.needs_input_grad[2:5]
        factors_N = upstream_N if weights_N is None else upstream_N * weights_N
        hidden_ND = _times_rows(ctx.gradients.hidden_ND, factors_N) if hidden else None
        if not (weight or bias):
            return None, None, hidden_ND, *[None] * 6
        head = _head_gradients(ctx, upstream_N, factors_N)
        weight_VD, bias_V = _as(head.weight_VD, weight_VD), _as(head.bias_V, bias_V)
        return None, None, hidden_ND, weight_VD, bias_V, None, None, None, None


def _swept(
    settings: SweepSettings,
    tensors: Sequence[Tensor | None],
    weights_N: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor, Gradients]:
    student, teacher = Head(*tensors[:3]), Head(*tensors[3:6])  # type: ignore[arg-type]
    with torch.autocast(student.hidden_ND.device.type, enabled=False):
        return Sweep(settings, student, teacher, weights_N, wanted).run()


def _head_gradients(ctx: Any, upstream_N: Tensor, factors_N: Tensor) -> Gradients:
    """Those of the forward pass, used up, if the upstream gradient is what they presume."""
    ready: Gradients = ctx.gradients
    ctx.gradients = Gradients(ready.hidden_ND, None, None)
    summed = [total for total in (ready.weight_VD, ready.bias_V) if total is not None]
    if summed and _uniform(upstream_N):
        for total in summed:
            total.mul_(upstream_N[0] if len(upstream_N) else 1.0)
        return ready
    del ready, summed
    wanted = Wanted(False, *ctx.needs_input_grad[3:5])
    return _swept(ctx.settings, ctx.saved_tensors, factors_N, wanted)[1]


def _uniform(upstream_N: Tensor) -> bool:
    """Whether one factor serves all; 0 does not, since rows that do not count may hold NaN."""
    return bool(((upstream_N == upstream_N[:1]) & (upstream_N != 0)).all())


def _times_rows(gradient_ND: Tensor, factors_N: Tensor) -> Tensor:
    """Each row times its factor; 0 hides whatever the row holds."""
    product = gradient_ND * factors_N[:, None]
    return product.masked_fill_((factors_N == 0)[:, None], 0.0).to(gradient_ND.dtype)


def _as(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)


# ---------------------------------------------------------------- arguments


def _checked_head(side: str, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Head:
    hidden, weight = list(hidden_ND.shape), list(weight_VD.shape)
    if len(hidden) != 2 or len(weight) != 2 or hidden[1] != weight[1]:
        raise ValueError(
            f"the {side}'s hidden states and weight must be [N, D] and [V, D], found {hidden} and "
            f"{weight}"
        )
    if bias_V is not None and list(bias_V.shape) != weight[:1]:
        raise ValueError(
            f"the {side}'s bias must be {weight[:1]}, one entry per row of the weight, found "
            f"{list(bias_V.shape)}"
        )
    return Head(hidden_ND, weight_VD, bias_V)


def _checked_softcap(softcap: float | None) -> float | None:
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be a finite number above 0, or None, found {softcap}")
    return softcap


def _checked_chunk_size(chunk_size: int | None, device: torch.device) -> int:
    if chunk_size is None:
        return CPU_ROWS if device.type == "cpu" else GPU_ROWS
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, found {chunk_size}")
    return chunk_size


def _common_vocabulary(student: Head, teacher: Head, vocab_size: int | None) -> int:
    common = min(len(student.weight_VD), len(teacher.weight_VD))
    if vocab_size is None:
        return common
    if not 1 <= vocab_size <= common:
        raise ValueError(
            f"vocab_size must lie between 1 and {common}, the rows that both heads have, "
            f"found {vocab_size}"
        )
    return vocab_size


def _check_rows(student: Head, teacher: Head, weights_N: Tensor | None) -> None:
    rows = len(student.hidden_ND)
    if len(teacher.hidden_ND) != rows:
        raise ValueError(
            f"student and teacher differ in tokens: {rows} and {len(teacher.hidden_ND)} rows"
        )
    if weights_N is None:
        return
    if weights_N.shape != (rows,):
        raise ValueError(f"weights_N must be [{rows}], found {list(weights_N.shape)}")
    if weights_N.requires_grad and torch.is_grad_enabled():
        raise ValueError("weights_N gets no gradient: detach it, or multiply the result by it")


def _product_dtype(hidden_ND: Tensor) -> torch.dtype:
    device = hidden_ND.device.type
    if hidden_ND.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_ND.dtype
