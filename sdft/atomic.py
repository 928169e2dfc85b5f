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
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new, empty folder beside `path`; on success it becomes `path`.

    Where another process has made `path` meanwhile, that one stays and this one's is removed. When
    the block raises, nothing is left.

    Raises:
        OSError: The parent folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for child in temporary.iterdir():
            with open(child, "rb") as file:
                os.fsync(file.fileno())
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
