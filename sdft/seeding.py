"""Randomness as a pure function of the run's seed and the place in the run.

Nothing random is carried over from one step to the next, so a resumed run draws what the
uninterrupted one would have drawn. The global generators are saved all the same, for what users
add.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def run_seed() -> int:
    """The seed that `seed_everything` set, 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def random_states() -> dict[str, Any]:
    """The states of the global random generators, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    states: dict[str, Any] = {
        "python": list(random.getstate()),
        "numpy": [
            str(kind),
            np.asarray(keys).tolist(),
            *rest,
        ],  # not a tensor: uint32 does not pickle
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put the global random generators where `random_states` found them.

    That of another kind of device is left alone.
    """
    version, inner, gauss = states["python"]
    random.setstate((version, tuple(inner), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
