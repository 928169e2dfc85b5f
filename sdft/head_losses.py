"""What a loss needs of hidden states: divergence and entropy behind heads, in chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from sdft.chunked import chunked_divergence
from sdft.head import Head
from sdft.losses import token_entropy

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
