"""Two processes and their models, without a run around it."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import work

PROBES = (
    "talking",
    "rollouts",
    "lonely_rollouts",
    "direct",
    "numbers",
    "average",
    "gradients",
    "half",
    "columns",
)


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    work([{"kind": "probe", "folder": tmp_path, "name": name} for name in PROBES], tmp_path)
