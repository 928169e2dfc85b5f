"""Stochastic rounding to bfloat16: unbiased, so that many small updates add up."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def stochastic_round(values: Tensor, generator: Generator) -> Tensor:
    """Round fp32 to bfloat16, up or down with the probability that keeps the mean.

    A bfloat16 number is the upper half of an fp32 number, so random bits are added to the lower
    half before it is cut off (Zamirai et al. 2020, arXiv 2010.06192).

    Args:
        values: fp32, finite.
        generator: On the device of `values`.

    Returns:
        The same shape in bfloat16; a value that bfloat16 can hold comes back unchanged.
    """
    assert values.dtype == torch.float32, values.dtype
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(
        0, 1 << 16, bits.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
