"""The gradients of one optimizer step: their norm, and how to let go of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from sdft.ranks import ranks, summed
from sdft.sharding import gathered


def gradient_norm(optimizer: Optimizer, in_parts: bool = False) -> Tensor:
    """The norm of all gradients together, as they would be clipped; a collective call of shards.

    Args:
        optimizer: Whose parameters have them.
        in_parts: Each process has its own part of every parameter, unmarked (FSDP1).
    """
    parameters = (value for group in optimizer.param_groups for value in group["params"])
    found = [value.grad for value in parameters if value.grad is not None]
    if not found:
        return torch.zeros(())
    norm = gathered(get_total_norm(found)).float()
    return summed(norm.double() ** 2).sqrt() if in_parts and ranks() > 1 else norm


def drop_gradients(optimizer: Optimizer) -> None:
    """Leave the optimizer nothing to do: weights, moments and step counts stay as they are."""
    for group in optimizer.param_groups:
        for value in group["params"]:
            value.grad = None
