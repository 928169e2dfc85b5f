"""A process is killed: the others stop with an error, and the run goes on from its checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import REPO, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc"),
]

MINUTE = 60.0
COMMAND = [sys.executable, "-m", "sdft", "fit", "-c", "configs/seq_skills.yaml"]
SMALL = [
    *("-c", "configs/smoke.yaml", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false", "--retention.kl_to_base", "false"),
    *("--retention.limit", "2", "--checkpoint.every_n_steps", "1", "--samples.count", "0"),
]


def wait_for(what: Callable[[], bool], seconds: float) -> float:
    """Wait until it holds; how long it took."""
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < seconds, "it took too long"
        time.sleep(0.1)
    return time.monotonic() - start


def children(pid: int) -> list[int]:
    """Processes that it has started, those of the run alone."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(p) for p in listed if b"sdft" in Path(f"/proc/{p}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize(("overlay", "victim"), [("ddp", 1), ("ddp", 0), ("fsdp", 1)])
def test_the_others_stop_and_the_run_goes_on(tmp_path: Path, overlay: str, victim: int) -> None:
    root = ["--trainer.default_root_dir", str(tmp_path)]
    several = ["-c", f"configs/{overlay}.yaml", "--trainer.devices", "2"]
    command = [*COMMAND, *several, *SMALL, *root]
    with (tmp_path / "out").open("wb") as out:
        long = [*command, "--data.steps", "5000"]
        first = subprocess.Popen(long, cwd=REPO, env=environment(), stdout=out, stderr=out)
    try:
        last = tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
        wait_for(lambda: last.exists() or first.poll() is not None, 2 * MINUTE)
        assert first.poll() is None, (tmp_path / "out").read_text()
        pids = [first.pid, *children(first.pid)]
        assert len(pids) == 2
        os.kill(pids[victim], signal.SIGKILL)
        # A dead one that nobody has asked about yet is still listed; `poll` asks.
        wait_for(lambda: first.poll() is not None and not any(map(is_running, pids)), MINUTE)
        assert first.returncode != 0
    finally:
        for pid in [first.pid, *children_left(first)]:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
    steps = 3  # from a run that was to be longer to a short one, with as many processes as before
    again = [*command, "--data.steps", str(steps), "--ckpt_path", "last"]
    done = subprocess.run(again, cwd=REPO, env=environment(), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    report = json.loads(
        last.parent.parent.with_name("version_1").joinpath("retention.json").read_text()
    )
    assert len(report["matrix"]) == 4


def children_left(process: subprocess.Popen[bytes]) -> list[int]:
    return children(process.pid) if process.poll() is None else []
