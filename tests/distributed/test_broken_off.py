"""Several processes are asked to end, or one is killed as a folder is written: nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from processes import REPO, environment, work, work_until_killed
from runs import models, new_folder
from test_equal import assert_close, left
from test_killed import COMMAND, MINUTE, SMALL, children, is_running, wait_for

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


def test_all_end_after_the_same_step(whole: Path, tmp_path: Path) -> None:
    """Whoever of them was asked."""
    asked = {"ddp": (0, signal.SIGTERM), "folder": (1, signal.SIGUSR1)}
    jobs = []
    for strategy, (rank, number) in asked.items():
        at_signal = {"rank": rank, "step": 3, "number": int(number)}
        ended, again = tmp_path / strategy, tmp_path / strategy / "again"
        jobs.append(job(ended, strategy, checkpoint={"every_n_steps": 0}, at_signal=at_signal))
        saved = "resumed/lightning_logs/version_0/checkpoints/step-3.ckpt"
        jobs.append(job(again, strategy, ckpt_path=str(ended / saved)))
    work(jobs, tmp_path)
    for strategy, (_, number) in asked.items():
        ended = tmp_path / strategy
        told = [json.loads((ended / f"interrupted-{rank}.json").read_text()) for rank in (0, 1)]
        assert [one["step"] for one in told] == [3, 3]
        assert [one["code"] for one in told] == [128 + number, 0], "or the first one is killed"
        path = Path(told[0]["checkpoint"])
        assert find_checkpoint(str(path.parents[1]), tmp_path) == path
        assert told[1]["checkpoint"] == str(path)
        assert_same(ended / "again", whole / strategy)


def test_killed_as_a_folder_is_written(whole: Path, tmp_path: Path) -> None:
    """Among its tensors, and before it has its name: the one before holds."""
    moments: list[dict[str, Any]] = [
        {"rank": 1, "call": 100, "name": "torch.distributed.checkpoint.filesystem._write_item"},
        {"rank": 0, "call": 2, "name": "sdft.checkpoints.replace_checkpoint"},
    ]
    steps = [0]
    resume: dict[str, Any] = {}
    for number, moment in enumerate(moments):
        place = tmp_path / f"{number}"
        jobs = [job(tmp_path, "folder", killed=moment, **resume)]
        work_until_killed(jobs, place, victim=moment["rank"])
        newest = find_checkpoint("last", tmp_path)
        steps.append(CheckpointFolder(newest.parent).newest().label["step"])
        resume = {"ckpt_path": str(newest)}
    assert steps == sorted(steps)
    assert 0 < steps[1] <= steps[-1] < STEPS
    work([job(tmp_path, "folder", **resume)], tmp_path / "last")
    assert list(tmp_path.rglob(".*.tmp")) == []
    assert_same(tmp_path, whole / "folder")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_a_command_that_started_the_others_ends_them(tmp_path: Path) -> None:
    """Its exit status is the signal's, and it speaks for all."""
    several = ["-c", "configs/ddp.yaml", "--trainer.devices", "2", "--data.steps", "5000"]
    words = [*COMMAND, *several, *SMALL, "--trainer.default_root_dir", str(tmp_path)]
    with (tmp_path / "out").open("wb") as out:
        run = subprocess.Popen(words, cwd=REPO, env=environment(), stdout=out, stderr=out)
    pids: list[int] = []
    try:
        folder = CheckpointFolder(tmp_path / "lightning_logs" / "version_0" / "checkpoints")
        wait_for(lambda: bool(folder.found()) or run.poll() is not None, 2 * MINUTE)
        pids = children(run.pid)
        run.terminate()
        assert run.wait(MINUTE) == 128 + signal.SIGTERM
        wait_for(lambda: not any(map(is_running, pids)), MINUTE)
    finally:
        for pid in [run.pid, *pids]:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
    told = (tmp_path / "out").read_text()
    assert told.count("go on with") == 1
    newest = folder.newest()
    assert f"ended by SIGTERM after step {newest.label['step']}, which is saved" in told
    assert told.rstrip().endswith(f"--ckpt_path {newest.path}")
