"""A run as a process of its own, which never outlives the comparison."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

# On Linux the kernel ends the run when the comparison dies, even by SIGKILL.
_GUARD = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Process(Protocol):
    """A run under way."""

    def poll(self) -> int | None:
        """The exit status; None while it runs. Below 0: the signal that ended it."""

    def stop(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""


class Launch(Protocol):
    """Starts `python -m sdft ARGUMENTS`."""

    def __call__(self, arguments: Sequence[str], log: Path) -> Process:
        """Start; what the process prints is appended to `log`."""


class Launcher:
    """Starts runs as operating-system processes.

    Args:
        threads: CPU threads of each.
        descriptors: Open files that they inherit (the folder's lock).
    """

    def __init__(self, threads: int, descriptors: Sequence[int] = ()) -> None:
        self.threads = threads
        self.descriptors = tuple(descriptors)

    def __call__(self, arguments: Sequence[str], log: Path) -> Process:
        """Start one, in a session of its own: Ctrl-C reaches it through the comparison alone."""
        command = ["-m", "sdft", *arguments]
        if sys.platform == "linux":
            command = ["-c", _GUARD, str(os.getpid()), *command]
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        with open(log, "ab") as output:
            return SystemProcess(
                subprocess.Popen(
                    [sys.executable, *command],
                    env={**os.environ, **threads},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=self.descriptors,
                )
            )


class SystemProcess:
    """An operating-system process, with all that it started.

    Args:
        process: Leads a session of its own.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self.process.poll()

    def stop(self) -> None:
        """SIGTERM."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def status_text(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by {signal.Signals(-status).name}"
