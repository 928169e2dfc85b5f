"""Runs of cases, each made once per session."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from processes import work

FAMILIES = ("llama", "qwen2", "gpt2")


@cache
def root() -> tempfile.TemporaryDirectory[str]:
    """Where they stay until the session ends."""
    return tempfile.TemporaryDirectory(prefix="sdft-distributed-")


def new_folder(name: str) -> Path:
    """An empty folder that lasts as long as the session."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root().name))


@cache
def models() -> Path:
    """Folders of the tiny models, one per family."""
    folder = new_folder("models")
    work([{"kind": "save", "folder": folder, "families": FAMILIES}], folder, ranks=1)
    return folder


@cache
def ran(strategy: str, names: tuple[str, ...]) -> Path:
    """Runs cases with a strategy; the folder that holds them."""
    folder = new_folder(strategy)
    ranks = 1 if strategy == "one" else 2
    shared = {"kind": "run", "models": models(), "folder": folder, "strategy": strategy}
    work([{**shared, "devices": ranks, "name": name} for name in names], folder, ranks)
    return folder
