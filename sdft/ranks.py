"""The processes of a run: how many there are, and what they say to one another.

Every function that talks is a collective call: all processes make it, in the same order. With one
process each is what its name says of one, without any communication.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")
Scalar = Tensor | float


def ranks() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if _started() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if _started() else 0


def _started() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def gathered(value: T) -> list[T]:
    """The value of every process, in the order of ranks; anything that can be pickled."""
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    distributed.all_gather_object(values, value)
    return values


def agreed(value: T) -> T:
    """The value of rank 0, for decisions that all have to take alike."""
    if ranks() == 1:
        return value
    values: list[Any] = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[no-any-return]


def summed(value: Tensor) -> Tensor:
    """The sum over processes; no gradient passes."""
    if ranks() == 1:
        return value.detach()
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total


def part_ways() -> None:
    """Wait until all have come to their end, and let go of one another; nothing is said after."""
    if _started():
        if ranks() > 1:
            distributed.barrier()
        distributed.destroy_process_group()


def part_of_mean(mean: Tensor, count: Tensor | int) -> Tensor:
    """This process's part of a mean over the things of all processes.

    Strategies average gradients over processes, so the part is scaled up by their number: the
    average of all parts is the mean over all things, whoever has how many of them. A process that
    has none contributes 0, with a gradient of 0.

    Args:
        mean: The mean over this process's things, a scalar.
        count: How many it has.
    """
    if ranks() == 1:
        return mean
    own = torch.as_tensor(count, dtype=torch.float64, device=mean.device)
    factor = own * ranks() / summed(own).clamp(min=1)
    return mean * factor.to(mean.dtype)


def means(values: Mapping[str, Scalar], count: Tensor | int, like: Tensor) -> dict[str, Scalar]:
    """Means over the things of all processes, from the means over each one's things.

    Args:
        values: Named means, the same names in all processes; one without things may say anything.
        count: How many things this process has.
        like: Says on which device the processes talk.
    """
    if ranks() == 1:
        return dict(values)
    weight = torch.as_tensor(count, dtype=torch.float64, device=like.device)
    own = [torch.as_tensor(v, dtype=torch.float64, device=like.device) for v in values.values()]
    parts = [torch.where(weight > 0, value.detach() * weight, 0.0) for value in own]
    *totals, total = summed(torch.stack([*parts, weight]))
    return {k: (t / total.clamp(min=1)).float() for k, t in zip(values, totals, strict=True)}
