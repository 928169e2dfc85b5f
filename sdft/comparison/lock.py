"""One comparison at a time in a folder."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folder_lock(folder: Path, patience: float = 3.0) -> Iterator[int]:
    """Hold the folder; yields the lock's file descriptor.

    The lock ends with the last process that has the descriptor, however it dies: runs that inherit
    it keep the folder from being used twice when the comparison alone is killed.

    Args:
        folder: Made when it is missing.
        patience: Seconds to wait for processes that are about to die.

    Raises:
        ValueError: Another comparison holds it.
        OSError: The folder is not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "compare.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _taken(descriptor, patience):
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise ValueError(
                f"another comparison (process {holder}), or a run of it, is at work in {folder}: "
                "wait for it, end it, or give another --out"
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _taken(descriptor: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        else:
            return True
