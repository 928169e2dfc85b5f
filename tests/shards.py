"""Checkpoints in other forms: in shards, as Lightning's strategies leave them, and malicious."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_saver import save


def as_shards(path: Path, folder: Path, root: str = "state_dict") -> Path:
    """Write a whole checkpoint anew as a sharded one; `root` depends on the strategy."""
    content = torch.load(path, weights_only=True)
    weights, optimizers = content.pop("state_dict"), content.pop("optimizer_states")
    state = {root: weights, **{f"optimizer_{i}": own for i, own in enumerate(optimizers)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, checkpoint_id=folder, no_dist=True)
    torch.save(content, folder / "meta.pt")
    return folder


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)
