"""Atomic writes: a file is the old one or the new one, a folder is whole or not there.

A run may be killed at any moment, and a reader may look at any moment.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it replaces `path`.

    The block creates the file at the yielded path. When the block raises, `path` stays as it was
    and the temporary file is removed.

    Raises:
        OSError: The folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    # Not `mkstemp`: its files are private to the user, and would stay so under the final name.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
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
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
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
