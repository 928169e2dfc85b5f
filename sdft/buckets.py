"""Coarse distributions: the likeliest tokens one by one, and one bucket, the tail, for all others.

A divergence between coarse distributions is a lower bound of the exact one (data-processing
inequality), and its gradient is that of the bucket, shared out among the bucket's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdft.divergence import divergence_, spare_buffers
from sdft.topk import log_tail, share_out_


def check_top_k(k: int | None) -> None:
    """Raise ValueError unless so many tokens can be compared one by one."""
    if k is not None and k < 1:
        raise ValueError(f"a divergence's top k must be at least 1, or unset, found {k}")


def likeliest(student: Tensor, teacher: Tensor, alpha: float, k: int) -> Tensor:
    """The tokens that keep a bucket of their own: `[..., K]`.

    The teacher's likeliest for forward KL, where its mass weighs; the student's for reverse KL; of
    the sum of both between them.

    Args:
        student: `[..., V]`, log-probabilities.
        teacher: `[..., V]`, log-probabilities.
        alpha: Which divergence, in [0, 1].
        k: K, below V.
    """
    by = {0.0: teacher, 1.0: student}.get(alpha)
    return (torch.logaddexp(student, teacher) if by is None else by).topk(k, dim=-1).indices


def bucketed(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of these tokens and, last, of all others together: `[..., K + 1]`.

    Args:
        log_probs: `[..., V]`.
        ids: `[..., K]`, each token once.
    """
    return torch.cat([log_probs.gather(-1, ids), log_tail(log_probs, ids)[..., None]], -1)


def bucket_divergence_(student: Tensor, teacher: Tensor, alpha: float, k: int) -> Tensor:
    """`sdft.losses.bucket_divergence` with its gradient in closed form, in place.

    With g the gradient of a bucket and q the student, a token's gradient is g·q(token)/q(bucket).

    Args:
        student: `[..., V]`, log-probabilities; becomes the gradient with respect to its logits.
        teacher: `[..., V]`, log-probabilities.
        alpha: Which divergence, in [0, 1].
        k: Tokens compared one by one, below V.

    Returns:
        `[...]`, the divergences in nats.
    """
    ids = likeliest(student, teacher, alpha, k)
    own, other = bucketed(student, ids), bucketed(teacher, ids)
    tail = own[..., -1:].clone()
    spare = [torch.empty_like(own) for _ in range(spare_buffers(alpha))]
    value = divergence_(own, other, alpha, spare, masked=True)
    share_out_(student, ids, tail, own)
    return value
