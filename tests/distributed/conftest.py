"""Models and runs that the tests of several processes share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import work

# By path: `conftest` is the name of this file, too.
FAMILIES = ("llama", "qwen2", "gpt2")

Ran = Callable[[str, tuple[str, ...]], Path]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the tiny models, one per family."""
    folder = tmp_path_factory.mktemp("models")
    work([{"kind": "save", "folder": folder, "families": FAMILIES}], folder, ranks=1)
    return folder


@pytest.fixture(scope="session")
def ran(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Runs cases with a strategy, once per session; the folder that holds them."""
    done: dict[Any, Path] = {}

    def runs(strategy: str, names: tuple[str, ...]) -> Path:
        if (strategy, names) not in done:
            folder = tmp_path_factory.mktemp(strategy)
            ranks = 1 if strategy == "one" else 2
            shared = {"kind": "run", "models": models, "folder": folder, "strategy": strategy}
            jobs = [{**shared, "devices": ranks, "name": name} for name in names]
            work(jobs, folder, ranks)
            done[strategy, names] = folder
        return done[strategy, names]

    return runs
