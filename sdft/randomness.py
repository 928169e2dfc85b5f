"""Random numbers for libraries with generators of their own.

`RolloutEngine` promises that torch's global generator is the only randomness. A library that seeds
the process for itself gets its seeds from there, and the process its generators back.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def drawn_seeds(count: int) -> list[int]:
    """31-bit seeds from torch's global generator."""
    seeds: list[int] = torch.randint(2**31 - 1, (count,)).tolist()
    return seeds


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Afterwards the generators of Python, NumPy and torch are as they were.

    Args:
        device: Whose generator is kept besides the CPU's.
    """
    python, numpy = random.getstate(), np.random.get_state()
    forked = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(forked, device_type=kind):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
