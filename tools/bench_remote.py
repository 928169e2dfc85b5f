"""Contenders in processes of their own, that make one step for each line they are sent.

So their steps can be interleaved, and none shares threads and memory with another. (Loops in
threads of one process would each have a team of OpenMP threads; with more of them than cores, idle
ones no longer wait actively, and a step of many small operations takes twice as long.)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench_laps import Lap
from bench_models import Plan

_HERE = Path(__file__)


class Remote:
    """A training loop in another process.

    Args:
        command: Starts it. Its first line says that it is ready for a step; then it answers every
            line, a step's lengths or null as JSON, with a `Lap`.

    Raises:
        RuntimeError: The process failed; with what it wrote. `step` raises it, too.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            self.command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True
        )
        self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return line
        self.process.wait()
        self.errors.seek(0)
        raise RuntimeError(f"{' '.join(self.command)} failed:\n{self.errors.read()[-4000:]}")

    def step(self, lengths: Sequence[int] | None = None) -> Lap:
        """Make one step.

        Args:
            lengths: Tokens of the completions that SFT learns; full ones when None.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(lengths) + "\n")
        self.process.stdin.flush()
        return Lap(**json.loads(self._line()))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.errors.close()


def start(name: str, plan: Plan, steps: int) -> Remote:
    """One of ours, ready for its first step.

    Args:
        name: `ours`, `sft` or `generate`.
        plan: Model and sizes.
        steps: How many steps it will be asked for at most.
    """
    script = str(_HERE.with_name("bench_serve.py"))
    return Remote([sys.executable, script, name, plan.dumps(), str(steps)])


def start_trl(python: str, plan: Plan, steps: int) -> Remote:
    """TRL's trainer, ready for its first step.

    Args:
        python: The interpreter of an environment with TRL.
        plan: A model in a folder, and sizes.
        steps: How many steps it will be asked for at most.
    """
    script = str(_HERE.with_name("bench_trl.py"))
    return Remote([python, script, plan.model, json.dumps(asdict(plan.setting)), str(steps)])
