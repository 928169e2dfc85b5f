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
