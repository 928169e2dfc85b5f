"""Targets cut down to the teacher's likeliest tokens, and the divergence from them.

The tokens left out share one bucket, the tail. The divergence between the coarse distributions is
exact, and by the log-sum inequality a lower bound of the one over the whole vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sdft.divergence import check_temperature, kl, log_probs


class TopK(NamedTuple):
    """Next-token distributions as their K likeliest tokens and the mass of all others.

    Attributes:
        ids: `[..., K]`, int32, likeliest first.
        log_probs: `[..., K]`, of these tokens in the whole distribution.
        tail: `[...]`, log of the other tokens' mass; −inf where there is none.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor


@torch.no_grad()
def topk_targets(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """Keep each distribution's `k` likeliest tokens and its remaining mass.

    Args:
        logits: `[..., V]`, any float dtype.
        k: Tokens kept; all of them where `k` is V or more.
        temperature: Divides the logits.

    Returns:
        The targets with K = min(k, V), detached, in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: `k` below 1, or `temperature` not above 0.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    log_probs_V = _scaled_log_probs(logits, temperature)
    kept, ids = log_probs_V.topk(min(k, logits.shape[-1]), dim=-1)
    return TopK(ids.to(torch.int32), kept, log_tail(log_probs_V, ids))


def topk_divergence(student_logits: Tensor, target: TopK, temperature: float = 1.0) -> Tensor:
    """Forward KL(target ‖ student) over the target's K tokens and the tail, token by token.

    Zero, with a gradient of zero, for the logits that the target was taken from; with K = V it is
    `token_divergence` at alpha 0. It never exceeds that, and grows with K. Tokens of the tail keep
    their proportions: the gradient only moves mass into the tail or out of it.

    Args:
        student_logits: `[B, T, V]`, any float dtype.
        target: Of `[B, T]` distributions over the same vocabulary, made with the same temperature.
        temperature: Divides the student's logits.

    Returns:
        `[B, T]`, nats, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: Shapes that do not fit together, or `temperature` not above 0.
    """
    check_target(tuple(student_logits.shape), target)
    student_BTV = _scaled_log_probs(student_logits, temperature)
    ids_BTK = target.ids.long()
    kept_BTK = student_BTV.gather(-1, ids_BTK)
    tail_BT = log_tail(student_BTV, ids_BTK)
    buckets = torch.cat([target.log_probs, target.tail[..., None]], -1).to(student_BTV.dtype)
    return kl(buckets, torch.cat([kept_BTK, tail_BT[..., None]], -1))


def _scaled_log_probs(logits: Tensor, temperature: float) -> Tensor:
    check_temperature(temperature)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return log_probs(logits if temperature == 1.0 else logits / temperature)


def log_tail(log_probs_V: Tensor, ids_K: Tensor) -> Tensor:
    """Log of the mass outside `ids_K`, summed as it stands: 1 − Σ would cancel."""
    others_V = log_probs_V.scatter(-1, ids_K, -math.inf)
    # logsumexp of nothing but −inf has a NaN gradient, which no mask behind it takes away.
    nothing = others_V.detach().amax(-1) == -math.inf
    return (
        others_V.masked_fill_(nothing[..., None], 0.0).logsumexp(-1).masked_fill(nothing, -math.inf)
    )


def share_out_(log_probs_V: Tensor, ids_K: Tensor, tail_1: Tensor, gradient: Tensor) -> None:
    """Turn log-probabilities into the gradient with respect to their logits, from that of buckets.

    Args:
        log_probs_V: `[..., V]`; overwritten.
        ids_K: `[..., K]`, tokens with a bucket of their own.
        tail_1: `[..., 1]`, log of the other tokens' mass.
        gradient: `[..., K + 1]`, of the buckets' masses under a softmax, the tail's last; the
            tail's tokens share it in proportion to their probabilities.
    """
    # Where the tail is empty all its tokens are at −inf: any finite number will do.
    log_probs_V.sub_(tail_1.masked_fill(tail_1 == -math.inf, 0.0)).exp_().mul_(gradient[..., -1:])
    log_probs_V.scatter_(-1, ids_K, gradient[..., :-1])  # also over what has overflowed


def check_target(logits: tuple[int, ...], target: TopK) -> None:
    """Raise ValueError unless a target is one of logits of this shape."""
    *positions, vocabulary = logits
    kept = target.ids.shape[-1]
    fits = target.ids.shape == target.log_probs.shape == (*positions, kept)
    if not (fits and target.tail.shape == (*positions,) and kept <= vocabulary):
        raise ValueError(
            f"student logits {logits} do not fit targets of ids {tuple(target.ids.shape)}, "
            f"log_probs {tuple(target.log_probs.shape)} and tail {tuple(target.tail.shape)}: "
            "expected […, V], […, K], […, K] and […] with K at most V"
        )
