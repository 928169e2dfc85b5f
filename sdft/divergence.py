"""Divergences of log-probabilities: the arithmetic that every loss over a vocabulary shares."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless `alpha` lies in [0, 1]."""
    if not (math.isfinite(alpha) and 0.0 <= alpha <= 1.0):
        raise ValueError(
            f"alpha must lie in [0, 1] (0 forward KL, 1 reverse KL, between JSD), found {alpha}"
        )


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless logits can be divided by `temperature`."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number above 0, found {temperature}")


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a loss of input of this type is computed in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_probs(logits: Tensor) -> Tensor:
    """Log-softmax over the last axis, in fp32 (fp64 for fp64 input)."""
    return log_softmax(logits, dim=-1, dtype=loss_dtype(logits.dtype))


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities over the last axis.

    A token with p = 0 contributes 0, one with only q = 0 inf.
    """
    probs = p.exp()
    impossible = probs == 0  # also where exp underflows: 0 · inf would be NaN
    difference = p.masked_fill(impossible, 0.0) - q.masked_fill(impossible, 0.0)
    return (probs * difference).sum(-1)


def spare_buffers(alpha: float) -> int:
    """How many scratch tensors `divergence_` needs."""
    return 1 if alpha in (0.0, 1.0) else 2


def divergence_(
    student: Tensor, teacher: Tensor, alpha: float, spare: list[Tensor], masked: bool = False
) -> Tensor:
    """`token_divergence` with its gradient in closed form, in place.

    With q the student and p the teacher, the gradient with respect to the student's logits is
    q − p for KL(p ‖ q), q·(log q/p − KL(q ‖ p)) for KL(q ‖ p), and between them
    (1 − alpha)·q·(log q/m − KL(q ‖ m)).

    Args:
        student: `[..., V]`, log-probabilities; becomes the gradient.
        teacher: `[..., V]`, log-probabilities; overwritten.
        alpha: Which divergence, in [0, 1].
        spare: `spare_buffers(alpha)` tensors of the same shape; overwritten.
        masked: Whether some log-probabilities may be −inf.

    Returns:
        `[...]`, the divergences in nats.
    """
    if alpha == 0.0:
        p = torch.exp(teacher, out=spare[0])
        value = _kl_(p, teacher, student, masked)
        student.exp_().sub_(p)
        return value
    if alpha == 1.0:
        return _reverse_kl_(student, teacher, spare[0], masked)
    return _jsd_(student, teacher, alpha, spare, masked)


def _kl_(probs: Tensor, this: Tensor, other: Tensor, masked: bool) -> Tensor:
    """KL of `probs`, whose log is `this`, from `other`; `this` becomes the sum's terms."""
    return _difference_(probs, this, other, masked).mul_(probs).sum(-1)


def _difference_(probs: Tensor, this: Tensor, other: Tensor, masked: bool) -> Tensor:
    this.sub_(other)
    # Finite logits keep the difference finite; −inf − −inf does not, and 0 · NaN is NaN.
    return this.masked_fill_(probs == 0, 0.0) if masked else this


def _reverse_kl_(student: Tensor, other: Tensor, spare: Tensor, masked: bool) -> Tensor:
    """KL(student ‖ other); `student` becomes its gradient if `other` stays."""
    q = torch.exp(student, out=spare)
    _difference_(q, student, other, masked)
    value = torch.mul(student, q, out=other).sum(-1)
    student.sub_(value[..., None]).mul_(q)
    return value


def _jsd_(
    student: Tensor, teacher: Tensor, alpha: float, spare: list[Tensor], masked: bool
) -> Tensor:
    p, mixture = torch.exp(teacher, out=spare[0]), torch.exp(student, out=spare[1])
    # Where both underflow, any finite logarithm does: they are multiplied by 0.
    mixture.lerp_(p, alpha).clamp_(min=torch.finfo(p.dtype).tiny).log_()
    forward = _kl_(p, teacher, mixture, masked)
    reverse = _reverse_kl_(student, mixture, spare[0], masked)
    student.mul_(1 - alpha)  # what the mixture owes to the student cancels out
    return alpha * forward + (1 - alpha) * reverse
