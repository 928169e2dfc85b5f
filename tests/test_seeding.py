"""The global random generators, saved and restored."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from sdft.seeding import random_states, set_random_states


def draw() -> list[float]:
    values = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
    return [*values, torch.rand(()).item()]


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves half of a pair behind
    np.random.randn()
    torch.save(random_states(), tmp_path / "states.pt")
    expected = draw()
    assert draw() != expected
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert draw() == expected
