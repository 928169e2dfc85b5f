"""The seal of a checkpoint: a digest of its content, and a label that says what it holds.

A file carries both in the comment of its zip archive, which `torch.load` does not mind; a folder
(`sdft.folder_seal`) in a file of its own. So a checkpoint is one thing that is renamed at once, and
what is damaged is found before anything of it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from sdft.folder_seal import (
    FOLDER_SEAL,
    DamagedCheckpoint,
    Label,
    check_folder,
    compare,
    digest,
    read_folder_label,
)

_MARK = b"sdft checkpoint "
_DIGITS = 64  # of a SHA-256
_END = struct.Struct("<4s4H2LH")  # a zip archive's last record, before its comment
_END_MARK = b"PK\x05\x06"
_COMMENT = 2  # bytes that say how long the comment is; the archive's last ones
_LONGEST = 2**16 - 1


def save_sealed(content: Any, path: Path, label: Label) -> None:
    """Write a checkpoint file with its seal, to the disk itself.

    The content goes to the file as it is serialised: it is never held in memory a second time.

    Args:
        content: Anything that `torch.save` takes.
        path: A new file.
        label: Plain values.

    Raises:
        OSError: It cannot be written.
    """
    with open(path, "wb") as file:
        writer = _Digesting(file)
        torch.save(content, writer)  # type: ignore[arg-type] # it only writes and flushes
        _put_comment(file, writer, label)
        file.flush()
        os.fsync(file.fileno())


def seal(path: Path, label: Label) -> None:
    """Seal a checkpoint file that something else has written.

    Raises:
        OSError: It cannot be written.
    """
    with open(path, "r+b") as file:
        writer = _Digesting(None)
        while block := file.read(2**20):
            writer.write(memoryview(block))
        _put_comment(file, writer, label)
        file.flush()
        os.fsync(file.fileno())


def read_label(path: Path) -> dict[str, Any] | None:
    """The label of a sealed checkpoint, without a look at the rest; None when it has no seal."""
    try:
        if path.is_dir():
            return read_folder_label(path)
        with open(path, "rb") as file:
            comment = _comment(file) or b""
        found = json.loads(comment[len(_MARK) : -_DIGITS]) if _is_seal(comment) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def read_digest(path: Path) -> str | None:
    """What the seal says of the content, as hexadecimal digits; None when there is no seal.

    A folder's is the digest of its seal, which has those of its files.
    """
    try:
        if path.is_dir():
            return hashlib.sha256((path / FOLDER_SEAL).read_bytes()).hexdigest()
        with open(path, "rb") as file:
            comment = _comment(file) or b""
    except OSError:
        return None
    return comment[-_DIGITS:].decode(errors="replace") if _is_seal(comment) else None


def check_content(path: Path) -> None:
    """Read a whole checkpoint and compare it with its seal; of one without, its archive's own sums.

    Raises:
        DamagedCheckpoint: It was cut off or changed; says how.
        OSError: It cannot be read.
    """
    if path.is_dir():
        check_folder(path)
        return
    with open(path, "rb") as file:
        comment = _comment(file)
        if comment is None:
            raise DamagedCheckpoint("its archive has no end: it was cut off, or is no checkpoint")
        if comment:
            if not _is_seal(comment):
                raise DamagedCheckpoint("its seal is not what was written")
            sealed = file.seek(0, os.SEEK_END) - _DIGITS
            compare(digest(file, sealed), comment[-_DIGITS:].decode(errors="replace"))
            return
    _check_archive(path)


# -------------------------------------------------------------------- files


class _Digesting:
    """Hands everything on to a file and digests it, but for the archive's last two bytes.

    Args:
        file: None only digests.
    """

    def __init__(self, file: IO[bytes] | None) -> None:
        self.file = file
        self.sum = hashlib.sha256()
        self._held = b""

    def write(self, data: memoryview) -> int:
        """Write a piece."""
        if self.file is not None:
            self.file.write(data)
        if len(data) >= _COMMENT:
            self.sum.update(self._held)
            self.sum.update(data[:-_COMMENT])
            self._held = bytes(data[-_COMMENT:])
        else:
            held = self._held + bytes(data)
            self.sum.update(held[:-_COMMENT])
            self._held = held[-_COMMENT:]
        return len(data)

    def flush(self) -> None:
        """Hand on what the file has buffered."""
        if self.file is not None:
            self.file.flush()


def _put_comment(file: IO[bytes], writer: _Digesting, label: Label) -> None:
    text = _MARK + json.dumps(label, ensure_ascii=True).encode()
    length = len(text) + _DIGITS
    if length > _LONGEST:
        text = _MARK + b"{}"
        length = len(text) + _DIGITS
    head = struct.pack("<H", length) + text
    writer.sum.update(head)
    file.seek(-_COMMENT, os.SEEK_END)
    file.write(head + writer.sum.hexdigest().encode())


def _comment(file: IO[bytes]) -> bytes | None:
    """The comment of an archive that ends where the file does; None without such an archive."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _LONGEST - _END.size))
    tail = file.read()
    start = tail.find(_END_MARK)
    while start >= 0:
        end = start + _END.size
        if end <= len(tail) and _END.unpack(tail[start:end])[-1] == len(tail) - end:
            return tail[end:]
        start = tail.find(_END_MARK, start + 1)
    return None


def _is_seal(comment: bytes) -> bool:
    """Whether a comment has mark, label and digest."""
    return comment.startswith(_MARK) and len(comment) > len(_MARK) + _DIGITS


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise DamagedCheckpoint(f"its archive is damaged ({error})") from error
    if bad is not None:
        raise DamagedCheckpoint(f"{bad!r} in its archive is not what was written")
