"""Starts the processes of a test, and waits for them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    kept = {k: v for k, v in os.environ.items() if k != "PL_GLOBAL_SEED"}
    return {**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def start(command: list[str], ranks: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    """The processes of one machine, as a launcher would start them; output in `out-<rank>`."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(ranks):
        with (folder / f"out-{rank}").open("wb") as out:
            env = environment(LOCAL_RANK=str(rank), NODE_RANK="0", **shared)
            started.append(subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=REPO))
    return started


def work(jobs: list[dict[str, Any]], folder: Path, ranks: int = 2, seconds: float = 240) -> None:
    """Have so many processes do jobs; fails with what they said."""
    processes = _begin(jobs, folder, ranks)
    try:
        codes = [process.wait(seconds) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [None]
    finally:
        for process in processes:
            process.kill()
    if any(codes) or None in codes:
        said = "\n".join((folder / f"out-{rank}").read_text()[-3000:] for rank in range(ranks))
        raise AssertionError(f"the processes ended with {codes}:\n{said}")


def work_until_killed(
    jobs: list[dict[str, Any]], folder: Path, victim: int, seconds: float = 240
) -> None:
    """The same for two processes, one of which kills itself: the other one has the same fate."""
    processes = _begin(jobs, folder, 2)
    try:
        assert processes[victim].wait(seconds) == -signal.SIGKILL
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _begin(jobs: list[dict[str, Any]], folder: Path, ranks: int) -> list[subprocess.Popen[bytes]]:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs, default=str))
    return start([sys.executable, str(HERE / "worker.py"), str(file)], ranks, folder)
