"""Runs Python that a model has written, with as little power as it needs.

The program gets a process of its own in an empty folder: limits on time, memory, file sizes and
open files; no environment; no sockets, no other processes and no signals (seccomp); no files but
those of Python, of the system's libraries and of its folder (Landlock). When its time is up, its
whole process group is killed. Needs Linux 5.13 on x86-64 or arm64, without any privilege.

This bounds accidents and what a model may stumble on; it is no defence against an exploit of
the kernel. Run untrusted models in a container or a virtual machine as well.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
REFUSED = 97
"""Exit status of a launcher that cannot confine the program."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: Wall-clock time, and processor time.
        memory_mb: Address space.
        file_mb: Size of each file it writes, its output included.
        protect_files: Confine it to its folder (Landlock).
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    file_mb: int = 16
    protect_files: bool = True


def run_python(program: str, limits: Limits) -> str | None:
    """Run a program to its end; returns what went wrong, or None.

    A program that leaves early (`sys.exit(0)`) has not come to its end.

    Raises:
        ValueError: This system cannot confine a program.
    """
    mark = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="sdft-sandbox-") as folder,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        file = Path(folder) / "program.py"
        file.write_text(f"{program}\n\nprint({mark!r})\n", "utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", str(LAUNCHER), *_arguments(file, limits)],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        told = _last_lines(err.fileno())
        if status == REFUSED:
            raise ValueError(f"the sandbox does not work here: {told}")
        if status is None:
            return f"ran longer than {limits.seconds:g} s"
        if status:
            return told.splitlines()[-1] if told else f"exit status {status}"
        return None if _last_lines(out.fileno()).endswith(mark) else "left before its end"


def _arguments(file: Path, limits: Limits) -> list[str]:
    numbers = (int(limits.seconds) + 1, limits.memory_mb << 20, limits.file_mb << 20)
    return [str(file), *map(str, numbers), str(int(limits.protect_files))]


def _last_lines(descriptor: int, size: int = 4096) -> str:
    length = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, size, max(0, length - size))
    return tail.decode("utf-8", errors="replace").strip()
