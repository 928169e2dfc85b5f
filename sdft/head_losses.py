"""What a loss needs of hidden states: the losses and figures behind heads, in chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from sdft.chunked import chunked_cross_entropy, chunked_divergence, chunked_topk_divergence
from sdft.head import Head
from sdft.losses import token_entropy
from sdft.topk import TopK, topk_targets

_ROWS = 256


def head_divergence(
    student_ND: Tensor,
    student: Head,
    teacher_ND: Tensor,
    teacher: Head,
    *,
    alpha: float = 0.0,
    temperature: float = 1.0,
    weights_N: Tensor | None = None,
    top_k: int | None = None,
) -> Tensor:
    """`chunked_divergence` of two models' hidden states, heads' scale and cap included.

    Args:
        student_ND: Hidden states, `[N, D]`; carry the gradient.
        student: The student's head; carries the gradient.
        teacher_ND: Hidden states, `[N, D']`.
        teacher: The teacher's head, with the same cap.
        alpha: 0 forward KL, 1 reverse KL, between: JSD.
        temperature: Divides the logits of both sides.
        weights_N: `[N]`, factors of the tokens' divergences; sum the result for one pass.
        top_k: Tokens compared one by one, the others as one; None: all.

    Returns:
        `[N]`, nats.
    """
    assert student.softcap == teacher.softcap, "a copy has the cap of its original"
    student_ND, student_weight, student_bias = _scaled(student_ND, student)
    teacher_ND, teacher_weight, teacher_bias = _scaled(teacher_ND, teacher)
    return chunked_divergence(
        student_ND,
        student_weight,
        teacher_ND,
        teacher_weight,
        alpha=alpha,
        temperature=temperature,
        student_bias_V=student_bias,
        teacher_bias_V=teacher_bias,
        softcap=student.softcap,
        weights_N=weights_N,
        top_k=top_k,
    )


def head_cross_entropy(
    hidden_ND: Tensor,
    head: Head,
    targets_N: Tensor,
    *,
    times_probability: bool = False,
    weights_N: Tensor | None = None,
) -> Tensor:
    """`chunked_cross_entropy` of a model's hidden states, the head's scale and cap included.

    Args:
        hidden_ND: Hidden states, `[N, D]`; carry the gradient.
        head: Carries the gradient.
        targets_N: Token ids.
        times_probability: Multiply each token's value by its probability, as a constant.
        weights_N: `[N]`, factors of the tokens' values; sum the result for one pass.

    Returns:
        `[N]`, nats.
    """
    hidden_ND, weight_VD, bias_V = _scaled(hidden_ND, head)
    return chunked_cross_entropy(
        hidden_ND,
        weight_VD,
        targets_N,
        times_probability=times_probability,
        bias_V=bias_V,
        softcap=head.softcap,
        weights_N=weights_N,
    )


def head_topk_divergence(
    hidden_ND: Tensor,
    head: Head,
    target: TopK,
    *,
    temperature: float = 1.0,
    weights_N: Tensor | None = None,
) -> Tensor:
    """`chunked_topk_divergence` of a model's hidden states, the head's scale and cap included.

    Args:
        hidden_ND: Hidden states, `[N, D]`; carry the gradient.
        head: Carries the gradient.
        target: Of the N tokens.
        temperature: Divides the student's logits.
        weights_N: `[N]`, factors of the tokens' divergences; sum the result for one pass.

    Returns:
        `[N]`, nats.
    """
    hidden_ND, weight_VD, bias_V = _scaled(hidden_ND, head)
    return chunked_topk_divergence(
        hidden_ND,
        weight_VD,
        target,
        temperature=temperature,
        bias_V=bias_V,
        softcap=head.softcap,
        weights_N=weights_N,
    )


@torch.no_grad()
def head_topk_targets(hidden_ND: Tensor, head: Head, k: int, temperature: float = 1.0) -> TopK:
    """`topk_targets` of each next-token distribution: `[N, D]` → `[N, K]`, `[N, K]` and `[N]`."""
    parts = [topk_targets(head.logits(rows), k, temperature) for rows in hidden_ND.split(_ROWS)]
    return TopK(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def head_entropy(hidden_ND: Tensor, head: Head) -> Tensor:
    """Entropy of each next-token distribution: `[N, D]` → `[N]`, nats."""
    return torch.cat([token_entropy(head.logits(rows)) for rows in hidden_ND.split(_ROWS)])


def _scaled(hidden_ND: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
    """The head's scale, carried over to what it multiplies."""
    if head.scale == 1.0:
        return hidden_ND, head.weight_VD, head.bias_V
    bias_V = None if head.bias_V is None else head.bias_V * head.scale
    return hidden_ND * head.scale, head.weight_VD, bias_V
