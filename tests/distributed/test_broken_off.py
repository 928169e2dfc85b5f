"""Several processes are asked to end, or one is killed as a folder is written: nothing is lost."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from processes import work
from runs import models, new_folder
from test_equal import assert_close, left

from sdft.checkpoints import CheckpointFolder, find_checkpoint

pytestmark = pytest.mark.slow

STEPS = 8  # of the whole run


def job(folder: Path, strategy: str, **more: Any) -> dict[str, Any]:
    shared = {"kind": "run", "name": "resumed", "models": models(), "devices": 2}
    return {**shared, "folder": folder, "strategy": strategy, **more}


@pytest.fixture(scope="module")
def whole() -> Path:
    """The run that nothing happens to."""
    folder = new_folder("whole")
    work([job(folder / strategy, strategy) for strategy in ("ddp", "folder")], folder)
    return folder


def assert_same(found: Path, expected: Path) -> None:
    (_, checkpoint, report), (_, wanted, wanted_report) = (
        left(folder, "resumed") for folder in (found, expected)
    )
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_close(checkpoint[key], wanted[key], key, tolerance=0.0)
    assert report == wanted_report


@pytest.mark.parametrize(
    ("strategy", "rank", "number"), [("ddp", 0, signal.SIGTERM), ("folder", 1, signal.SIGUSR1)]
)
def test_all_end_after_the_same_step(
    whole: Path, tmp_path: Path, strategy: str, rank: int, number: int
) -> None:
    """Whoever of them was asked."""
    checkpoint = {"every_n_steps": 0}
    asked = {"rank": rank, "step": 3, "number": int(number)}
    work([job(tmp_path, strategy, checkpoint=checkpoint, at_signal=asked)], tmp_path)
    told = [json.loads((tmp_path / f"interrupted-{r}.json").read_text()) for r in (0, 1)]
    path = find_checkpoint("last", tmp_path)
    assert path.name == "step-3.ckpt"
    assert [one["step"] for one in told] == [3, 3]
    assert [one["checkpoint"] for one in told] == [str(path)] * 2
    assert [one["code"] for one in told] == [128 + number, 0], "or the first one is killed"
    again = job(tmp_path / "again", strategy, ckpt_path=str(path))
    work([again], tmp_path / "again")
    assert_same(tmp_path / "again", whole / strategy)


def test_killed_as_a_folder_is_written(whole: Path, tmp_path: Path) -> None:
    """Among its tensors, as it is sealed, before it has its name: each time the one before holds."""
    moments = [
        {"rank": 1, "call": 100, "name": "torch.distributed.checkpoint.filesystem._write_item"},
        {"rank": 0, "call": 5, "name": "sdft.folder_seal._facts"},
        {"rank": 0, "call": 2, "name": "sdft.checkpoints.replace_checkpoint"},
    ]
    steps = [0]
    resume: dict[str, Any] = {}
    for number, moment in enumerate(moments):
        place = tmp_path / f"{number}"
        work([job(tmp_path, "folder", killed=moment, **resume)], place, killed=True)
        assert list(tmp_path.rglob(".*.tmp")), "half a checkpoint"
        newest = find_checkpoint("last", tmp_path)
        steps.append(CheckpointFolder(newest.parent).newest().label["step"])
        resume = {"ckpt_path": str(newest)}
    assert steps == sorted(steps)
    assert 0 < steps[1] <= steps[-1] < STEPS
    work([job(tmp_path, "folder", **resume)], tmp_path / "last")
    assert list(tmp_path.rglob(".*.tmp")) == []
    assert_same(tmp_path, whole / "folder")
