"""Atomic writes: a file is the old one or the new one, a folder is whole or not there.

A run may be killed at any moment, and a reader may look at any moment.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SILENT = 3600.0  # seconds after which a temporary name that nobody writes to is left over


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it replaces `path`.

    The block creates the file at the yielded path. When the block raises, `path` stays as it was
    and the temporary file is removed.

    Raises:
        OSError: The folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # `write` on a full disk does not say which file it was.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """Yield a new, empty folder beside `path`; on success it becomes `path`.

    Where another process has made `path` meanwhile, that one stays and this one's is removed. When
    the block raises, nothing is left.

    Args:
        path: The folder.
        replace: Put it in the place of a folder that is there, which is then deleted.

    Raises:
        OSError: The parent folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        for child in temporary.rglob("*"):
            if child.is_file():
                with open(child, "rb") as file:
                    os.fsync(file.fileno())
        if replace and path.is_dir():
            _exchange(temporary, path)
        else:
            _rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, path: Path) -> None:
    try:
        os.rename(temporary, path)
    except OSError:
        if not path.is_dir():
            raise


def _exchange(temporary: Path, path: Path) -> None:
    """Two renames: no system call of Python's exchanges folders at once."""
    aside = temporary.with_suffix(".old")
    os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Have the disk know the names in a folder; where a system cannot, nothing happens."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """A name beside `path` that says which process made it, for `remove_leftovers`."""
    # Not `mkstemp`: its files are private to the user, and would stay so under the final name.
    mark = f"{_node()}.{os.getpid()}.{uuid.uuid4().hex[:12]}"
    return path.with_name(f".{path.name}.{mark}.tmp")


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the temporary files and folders that killed processes have left; returns them.

    A process calls it before it writes there itself. What a living one is writing stays.
    """
    made = [*folder.glob(".*.tmp"), *folder.glob(".*.old")]
    found = [path for path in made if _is_left_over(path)]
    for path in found:
        remove(path)
    return found


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_left_over(path: Path) -> bool:
    *_, node, process, _, _ = [*[""] * 3, *path.name.split(".")]
    if node == _node() and process.isdecimal() and not _works(int(process)):
        return True
    try:
        touched = max(own.stat().st_mtime for own in (path, *path.rglob("*")))
    except OSError:  # gone meanwhile
        return False
    return time.time() - touched > _SILENT


def _works(process: int) -> bool:
    """Whether it is another living process; in containers numbers come again."""
    if process == os.getpid() or os.name == "nt":
        return os.name == "nt"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _node() -> str:
    return re.sub(r"[^\w-]", "-", platform.node())
