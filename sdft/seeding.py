"""Randomness as a pure function of the run's seed and the place in the run.

Nothing random is carried over from one step to the next, so a resumed run draws what the
uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
import os


def run_seed() -> int:
    """The seed that `seed_everything` set, 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
