"""A run of many stages needs no more memory, files or handles at its end than at its beginning."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_data
from lightning.pytorch import Callback, Trainer

from sdft.callbacks import Filters, Gate, Guard, Retention
from sdft.checks import LengthCheck
from sdft.run import run_folder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_plots")]

STAGES = 36
PROC = Path("/proc/self")


class Gauge(Callback):
    """Measures the process and the run's folder as each stage begins."""

    def __init__(self) -> None:
        self.memory: list[int] = []
        self.handles: list[int] = []
        self.disk: list[int] = []
        self.objects: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        gc.collect()
        pages = int((PROC / "statm").read_text().split()[1])
        self.memory.append(pages * os.sysconf("SC_PAGE_SIZE"))
        self.handles.append(len(list((PROC / "fd").iterdir())))
        files = [path for path in run_folder(trainer).rglob("*") if path.is_file()]
        self.disk.append(sum(path.stat().st_size for path in files if not path.is_symlink()))
        self.objects.append(len(gc.get_objects()))


@pytest.mark.skipif(not PROC.is_dir(), reason="needs /proc")
def test_many_stages(fit: Callable[..., Any]) -> None:
    gauge = Gauge()
    data = make_data([f"task{number}" for number in range(STAGES)], steps=1, batch_size=2)
    fit(
        data=data,
        retention=Retention(limit=1),
        callbacks=[Guard(), Gate("continue"), Filters([LengthCheck(1)]), gauge],
    )
    assert len(gauge.memory) == STAGES
    third = STAGES // 3
    # A checkpoint per stage stays, on purpose; all else is rows of reports.
    growth = [later - before for before, later in zip(gauge.disk, gauge.disk[1:], strict=False)]
    early, late = growth[third : 2 * third], growth[2 * third :]
    assert sum(late) / len(late) < 1.3 * sum(early) / len(early)
    assert max(gauge.handles[2 * third :]) <= max(gauge.handles[: 2 * third])
    per_stage = (gauge.memory[-1] - gauge.memory[third]) / (STAGES - third)
    assert per_stage < 2**20, f"{per_stage / 2**20:.2f} MiB more per stage"
    # Rows of the matrix grow with the square of the stages; nothing else may.
    cells = STAGES * (STAGES + 1)
    assert gauge.objects[-1] - gauge.objects[third] < 40 * cells
