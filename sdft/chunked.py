"""The exact losses from hidden states, a few rows at a time: no `[N, V]` tensor ever exists.

The heads are applied to one chunk of rows, the loss's gradient with respect to the chunk's
logits is written down in closed form, carried on to hidden states and head, and forgotten. So one
pass, the forward one, gives values and gradients, and the memory is that of a chunk and of the
head's gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdft.buckets import check_top_k
from sdft.divergence import check_alpha, check_temperature, loss_dtype
from sdft.forward_gradient import swept_loss
from sdft.objectives import CrossEntropy, Divergence, TopKDivergence
from sdft.sweep import Head, Objective, SweepSettings
from sdft.topk import TopK, check_target

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
    student_dtype = _product_dtype(student_hidden_ND)
    teacher_dtype = _product_dtype(teacher_hidden_ND)
    vocabulary = _common_vocabulary(student, teacher, vocab_size)
    settings = SweepSettings(
        temperature=temperature,
        softcap=_checked_softcap(softcap),
        vocabulary=vocabulary,
        chunk_size=_checked_chunk_size(chunk_size, student_hidden_ND.device),
        student_dtype=student_dtype,
        dtype=loss_dtype(torch.promote_types(student_dtype, teacher_dtype)),
    )
    if len(teacher_hidden_ND) != len(student_hidden_ND):
        raise ValueError(
            f"student and teacher differ in tokens: {len(student_hidden_ND)} and "
            f"{len(teacher_hidden_ND)} rows"
        )
    _check_weights(student, weights_N)
    fixed = Head(*(None if tensor is None else tensor.detach() for tensor in teacher))  # type: ignore[arg-type]
    likeliest = None if top_k is None or top_k >= vocabulary else top_k
    objective = Divergence(fixed, alpha, teacher_dtype, likeliest)
    return swept_loss(settings, objective, student, weights_N)


def chunked_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    times_probability: bool = False,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    weights_N: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """`token_cross_entropy` of a head's logits, `hidden @ weight.T + bias`, never whole.

    Gradients, types, weights and memory as in `chunked_divergence`, with 2 tensors of
    `[chunk_size, V]`.

    Args:
        hidden_ND: `[N, D]`, the head's input.
        weight_VD: `[V, D]`; may be tied to the embedding.
        targets_N: `[N]`, token ids below V.
        times_probability: Multiply each token's value by its probability, through which no gradient
            passes: p·CE, with the gradient −∇p (DFT, arXiv 2508.05629, eq. 9).
        bias_V: `[V]`; −inf rules a token out.
        softcap: Logits become softcap·tanh(logits / softcap).
        weights_N: `[N]`, factors of the tokens' values, without a gradient; 0 hides a row.
        chunk_size: Rows at once; None: 256 on CPU, 1024 elsewhere.

    Returns:
        `[N]`, nats, fp32 (fp64 for fp64 input); times `weights_N` if given.

    Raises:
        ValueError: A number out of range or shapes that do not fit together.
        RuntimeError: In a backward pass with `create_graph=True`: there is no second derivative.
    """
    student = _checked_head("student", hidden_ND, weight_VD, bias_V)
    if targets_N.shape != (len(hidden_ND),):
        raise ValueError(f"targets_N must be [{len(hidden_ND)}], found {list(targets_N.shape)}")
    objective = CrossEntropy(targets_N, times_probability)
    return _against_targets(student, objective, 1.0, softcap, weights_N, chunk_size)


def chunked_topk_divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target: TopK,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    weights_N: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """`topk_divergence` of a head's logits, `hidden @ weight.T + bias`, which never stand whole.

    Gradients, types, weights and memory as in `chunked_divergence`, with 4 tensors of
    `[chunk_size, V]`.

    Args:
        hidden_ND: `[N, D]`, the student head's input.
        weight_VD: `[V, D]`; may be tied to the embedding.
        target: Of the N tokens: ids and log-probabilities `[N, K]`, tail `[N]`.
        temperature: Divides the student's logits.
        bias_V: `[V]`; −inf rules a token out.
        softcap: Logits become softcap·tanh(logits / softcap), before the temperature.
        weights_N: `[N]`, factors of the tokens' divergences, without a gradient; 0 hides a row.
        chunk_size: Rows at once; None: 256 on CPU, 1024 elsewhere.

    Returns:
        `[N]`, nats, fp32 (fp64 for fp64 input); times `weights_N` if given.

    Raises:
        ValueError: A number out of range or shapes that do not fit together.
        RuntimeError: In a backward pass with `create_graph=True`: there is no second derivative.
    """
    check_temperature(temperature)
    student = _checked_head("student", hidden_ND, weight_VD, bias_V)
    check_target((len(hidden_ND), len(weight_VD)), target)
    return _against_targets(
        student, TopKDivergence(target), temperature, softcap, weights_N, chunk_size
    )


def _against_targets(
    student: Head,
    objective: Objective,
    temperature: float,
    softcap: float | None,
    weights_N: Tensor | None,
    chunk_size: int | None,
) -> Tensor:
    """An objective of the student alone, over its whole vocabulary."""
    dtype = _product_dtype(student.hidden_ND)
    settings = SweepSettings(
        temperature=temperature,
        softcap=_checked_softcap(softcap),
        vocabulary=len(student.weight_VD),
        chunk_size=_checked_chunk_size(chunk_size, student.hidden_ND.device),
        student_dtype=dtype,
        dtype=loss_dtype(dtype),
    )
    _check_weights(student, weights_N)
    return swept_loss(settings, objective, student, weights_N)


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


def _check_weights(student: Head, weights_N: Tensor | None) -> None:
    if weights_N is None:
        return
    rows = len(student.hidden_ND)
    if weights_N.shape != (rows,):
        raise ValueError(f"weights_N must be [{rows}], found {list(weights_N.shape)}")
    if weights_N.requires_grad and torch.is_grad_enabled():
        raise ValueError("weights_N gets no gradient: detach it, or multiply the result by it")


def _product_dtype(hidden_ND: Tensor) -> torch.dtype:
    device = hidden_ND.device.type
    if hidden_ND.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_ND.dtype
