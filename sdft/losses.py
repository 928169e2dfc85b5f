"""Per-token divergences between student and teacher, and their means: pure functions.

The direction that the paper's results use is forward KL, KL(teacher ‖ student), over the full
vocabulary, averaged over the tokens of each sequence and then over sequences (arXiv 2601.19897 v2,
section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sdft.buckets import bucketed, check_top_k, likeliest
from sdft.chunked import (
    chunked_cross_entropy,
    chunked_divergence,
    chunked_topk_divergence,
)
from sdft.divergence import check_alpha, kl, log_probs, loss_dtype
from sdft.sharding import local
from sdft.topk import TopK, topk_divergence, topk_targets

__all__ = [
    "TopK",
    "bucket_divergence",
    "check_alpha",
    "chunked_cross_entropy",
    "chunked_divergence",
    "chunked_topk_divergence",
    "sequence_mean",
    "sequence_weights",
    "token_cross_entropy",
    "token_divergence",
    "token_entropy",
    "topk_divergence",
    "topk_targets",
    "zero_loss",
]


def token_divergence(student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.0) -> Tensor:
    """Exact divergence between two next-token distributions, token by token, in fp32.

    With p the teacher and q the student:

    * `alpha` 0: forward KL, KL(p ‖ q);
    * `alpha` 1: reverse KL, KL(q ‖ p);
    * between: generalised Jensen-Shannon divergence, alpha·KL(p ‖ m) + (1 − alpha)·KL(q ‖ m)
      with m = (1 − alpha)·q + alpha·p.

    A token that both sides rule out (logit −inf) contributes 0 to value and gradient.

    Args:
        student_logits: `[B, T, V]`, any float dtype.
        teacher_logits: `[B, T, V]`.
        alpha: Which divergence, in [0, 1].

    Returns:
        `[B, T]`, nats, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: `alpha` outside [0, 1] or shapes that differ.
    """
    check_alpha(alpha)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher logits differ in shape: {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}"
        )
    student_BTV, teacher_BTV = log_probs(student_logits), log_probs(teacher_logits)
    if alpha == 0.0:
        return kl(teacher_BTV, student_BTV)
    if alpha == 1.0:
        return kl(student_BTV, teacher_BTV)
    mixture_BTV = _log_mixture(student_BTV, teacher_BTV, alpha)
    return alpha * kl(teacher_BTV, mixture_BTV) + (1 - alpha) * kl(student_BTV, mixture_BTV)


def bucket_divergence(
    student_logits: Tensor, teacher_logits: Tensor, k: int, alpha: float = 0.0
) -> Tensor:
    """`token_divergence` of coarse distributions: k tokens one by one, all others as one, the tail.

    The k tokens are the teacher's likeliest for forward KL, the student's for reverse KL, and
    between them those of the sum of both; no gradient goes through the choice. By the
    data-processing inequality the value is never above the exact one, which it is at k = V.

    Args:
        student_logits: `[B, T, V]`, any float dtype.
        teacher_logits: `[B, T, V]`.
        k: Tokens compared one by one; all of them where `k` is V or more.
        alpha: As for `token_divergence`.

    Returns:
        `[B, T]`, nats, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: `k` below 1, `alpha` outside [0, 1] or shapes that differ.
    """
    check_top_k(k)
    if k >= student_logits.shape[-1] or student_logits.shape != teacher_logits.shape:
        return token_divergence(student_logits, teacher_logits, alpha)
    student_BTV, teacher_BTV = log_probs(student_logits), log_probs(teacher_logits)
    ids_BTK = likeliest(student_BTV.detach(), teacher_BTV.detach(), alpha, k)
    return token_divergence(bucketed(student_BTV, ids_BTK), bucketed(teacher_BTV, ids_BTK), alpha)


def sequence_mean(per_token: Tensor, mask: Tensor) -> Tensor:
    """Mean over each sequence's unmasked tokens, then over the sequences that have any.

    A batch without a single unmasked token gives 0, with a gradient of 0.

    Args:
        per_token: `[B, T]`.
        mask: `[B, T]`, true (1) where a token counts.

    Returns:
        A scalar.

    Raises:
        ValueError: Shapes that differ.
    """
    if per_token.shape != mask.shape:
        raise ValueError(
            f"per_token {tuple(per_token.shape)} and mask {tuple(mask.shape)} differ in shape"
        )
    mask = mask.bool()
    totals_B = torch.where(mask, per_token, torch.zeros_like(per_token)).sum(-1)
    counts_B = mask.sum(-1)
    means_B = totals_B / counts_B.clamp(min=1)
    return means_B.sum() / (counts_B > 0).sum().clamp(min=1)


def sequence_weights(mask: Tensor) -> Tensor:
    """Weights whose weighted sum is `sequence_mean`: `[B, T]` → `[B, T]`, fp32, 0 off the mask."""
    mask = mask.bool()
    counts_B = mask.sum(-1)
    sequences = (counts_B > 0).sum().clamp(min=1)
    return mask / (counts_B.clamp(min=1) * sequences)[:, None]


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, in fp32 (fp64 for fp64 input).

    Args:
        logits: `[B, T, V]`.
        targets: `[B, T]`, token ids.

    Returns:
        `[B, T]`, nats.
    """
    logits = logits.to(loss_dtype(logits.dtype))
    return cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def zero_loss(parameters: Iterable[Tensor]) -> Tensor:
    """A loss of 0 whose gradient is 0, for a batch with nothing to learn from.

    Args:
        parameters: What trains; each gets a gradient.
    """
    trained = [local(value) for value in parameters if value.requires_grad]
    firsts = [value.reshape(-1)[:1].float().sum() for value in trained]  # a shard may be empty
    return 0.0 * torch.stack(firsts).sum()


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of each next-token distribution: `[B, T, V]` → `[B, T]`, nats, fp32."""
    log_probs_BTV = log_probs(logits)
    return -_expectation(log_probs_BTV, log_probs_BTV)


def _expectation(p_BTV: Tensor, value_BTV: Tensor) -> Tensor:
    return (p_BTV.exp() * value_BTV.masked_fill(p_BTV == -math.inf, 0.0)).sum(-1)


def _log_mixture(student_BTV: Tensor, teacher_BTV: Tensor, alpha: float) -> Tensor:
    """Log of (1 − alpha)·student + alpha·teacher."""
    # logaddexp(-inf, -inf) has a NaN gradient; such tokens never count, so any finite value does.
    neither = (student_BTV == -math.inf) & (teacher_BTV == -math.inf)
    return torch.logaddexp(
        student_BTV.masked_fill(neither, 0.0) + math.log1p(-alpha),
        teacher_BTV.masked_fill(neither, 0.0) + math.log(alpha),
    )
