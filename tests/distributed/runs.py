"""Runs of cases, each made once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from processes import work

FAMILIES = ("llama", "qwen2", "gpt2")
_DONE: dict[tuple[str, ...], Path] = {}

Ran = Callable[[str, tuple[str, ...]], Path]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the tiny models, one per family."""
    if ("models",) not in _DONE:
        folder = tmp_path_factory.mktemp("models")
        work([{"kind": "save", "folder": folder, "families": FAMILIES}], folder, ranks=1)
        _DONE["models",] = folder
    return _DONE["models",]


@pytest.fixture(scope="session")
def ran(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Runs cases with a strategy; the folder that holds them."""

    def runs(strategy: str, names: tuple[str, ...]) -> Path:
        if (strategy, *names) not in _DONE:
            folder = tmp_path_factory.mktemp(strategy)
            ranks = 1 if strategy == "one" else 2
            shared = {"kind": "run", "models": models, "folder": folder, "strategy": strategy}
            work([{**shared, "devices": ranks, "name": name} for name in names], folder, ranks)
            _DONE[strategy, *names] = folder
        return _DONE[strategy, *names]

    return runs
