"""Steps of one contender in a process of its own: what memory it takes, with nothing beside it.

The other benchmarks start it as `python tools/bench_alone.py JOB`, with a job as JSON; its last
line is the answer, as JSON.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_contenders import make_contender, replayed
from bench_laps import Lap
from bench_models import Plan

from sdft.memory import process_peak
from sdft.rollout import Rollout

_CLEAR = Path("/proc/self/clear_refs")
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Alone:
    """What a contender did with nothing beside it.

    Attributes:
        laps: The steps that count.
        peak: Most bytes while they ran: resident on a CPU (with the interpreter and its
            libraries), allocated on CUDA.
        held: Bytes between two steps: weights, gradients, optimizer states, copies.
    """

    laps: list[Lap]
    peak: int
    held: int

    @property
    def above(self) -> int:
        """Bytes that a step takes for a while."""
        return max(self.peak - self.held, 0)


def run_alone(
    name: str,
    plan: Plan,
    repeats: int = 3,
    warmup: int = 1,
    lengths: Sequence[Sequence[int]] | None = None,
) -> Alone:
    """Make steps in another process.

    Args:
        name: The contender.
        plan: Model and sizes.
        repeats: Steps that count.
        warmup: Steps before them, at least 1.
        lengths: Of the completions that SFT learns, of each step that counts.

    Raises:
        RuntimeError: The process failed; with what it wrote.
    """
    job = {"name": name, "plan": plan.dumps(), "repeats": repeats, "warmup": max(warmup, 1)}
    if torch.cuda.is_available():  # the other process needs what this one no longer uses
        gc.collect()
        torch.cuda.empty_cache()
    command = [sys.executable, __file__, json.dumps({**job, "lengths": lengths})]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    if found.returncode != 0:
        raise RuntimeError(f"{name} alone failed:\n{found.stderr[-4000:]}")
    answer = json.loads(found.stdout.strip().splitlines()[-1])
    return Alone([Lap(**lap) for lap in answer["laps"]], answer["peak"], answer["held"])


def serve(job: dict[str, Any]) -> Alone:
    """Make the steps of a job, here."""
    plan, warmup, repeats = Plan.loads(job["plan"]), job["warmup"], job["repeats"]
    source = _source(plan, job["lengths"], warmup)
    contender = make_contender(job["name"], plan, warmup + repeats + 1, lambda: next(source))
    for _ in range(warmup):
        contender.step()
    held = _held()
    _forget_peak()
    laps = [contender.step() for _ in range(repeats)]
    return Alone(laps, _peak(), held)


def _source(plan: Plan, lengths: Sequence[Sequence[int]] | None, warmup: int) -> Iterator[Rollout]:
    """The completions of every step, full ones where no lengths are given."""
    setting = plan.setting
    full = [[setting.completion] * setting.batch]
    steps = [list(step) for step in lengths or ()]
    while True:
        yield from replayed([*(steps[:1] or full) * warmup, *steps], setting.vocab)


def _held() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    if not _STATM.exists():
        return 0
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _forget_peak() -> None:
    """Begin the peak anew, where the system lets one; else it is that of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def _peak() -> int:
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else process_peak()


def quiet() -> None:
    """Silence what would stand between the figures."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    """Answer one job."""
    quiet()
    print(json.dumps(asdict(serve(json.loads(sys.argv[1])))))
    sys.stdout.flush()
    os._exit(0)  # the loop's thread still waits for its next step


if __name__ == "__main__":
    main()
