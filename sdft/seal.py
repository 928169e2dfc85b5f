"""The seal of a checkpoint: a digest of its content, and a label that says what it holds.

A file carries both in the comment of its zip archive, which `torch.load` does not mind; a folder in
a file of its own, with the digest of every other file. So a checkpoint is one thing that is renamed
at once, and what is damaged is found before anything of it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

FOLDER_SEAL = "seal.json"
"""A sealed folder's digests and label."""
_INDEX = ".metadata"  # of a sharded checkpoint, as torch writes it
_MARK = b"sdft checkpoint "
_DIGITS = 64  # of a SHA-256
_END = struct.Struct("<4s4H2LH")  # a zip archive's last record, before its comment
_END_MARK = b"PK\x05\x06"
_COMMENT = 2  # bytes that say how long the comment is; the archive's last ones
_LONGEST = 2**16 - 1

Label = Mapping[str, Any]


class DamagedCheckpoint(ValueError):
    """A checkpoint is not what was written."""


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
    """Seal a checkpoint that something else has written: a file or a folder.

    Raises:
        OSError: It cannot be written.
    """
    if path.is_dir():
        _seal_folder(path, label)
        return
    with open(path, "r+b") as file:
        writer = _Digesting(None)
        while block := file.read(2**20):
            writer.write(memoryview(block))
        _put_comment(file, writer, label)
        file.flush()
        os.fsync(file.fileno())


def is_folder_checkpoint(path: Path) -> bool:
    """Whether a folder is a sharded checkpoint, and not one that holds checkpoints."""
    return (path / FOLDER_SEAL).is_file() or (path / _INDEX).is_file()


def read_label(path: Path) -> dict[str, Any] | None:
    """The label of a sealed checkpoint, without a look at the rest; None when it has no seal."""
    try:
        if path.is_dir():
            found = json.loads((path / FOLDER_SEAL).read_text(encoding="utf-8"))["label"]
        else:
            with open(path, "rb") as file:
                comment = _comment(file) or b""
            found = json.loads(comment[len(_MARK) : -_DIGITS]) if _is_seal(comment) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def check_content(path: Path) -> None:
    """Read a whole checkpoint and compare it with its seal; of one without, its archive's own sums.

    Raises:
        DamagedCheckpoint: It was cut off or changed; says how.
        OSError: It cannot be read.
    """
    if path.is_dir():
        _check_folder(path)
        return
    with open(path, "rb") as file:
        comment = _comment(file)
        if comment is None:
            raise DamagedCheckpoint("its archive has no end: it was cut off, or is no checkpoint")
        if comment:
            if not _is_seal(comment):
                raise DamagedCheckpoint("its seal is not what was written")
            sealed = file.seek(0, os.SEEK_END) - _DIGITS
            _compare(_digest(file, sealed), comment[-_DIGITS:].decode(errors="replace"))
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


def _digest(file: IO[bytes], size: int | None = None) -> str:
    """SHA-256 of a file's first bytes, or of all."""
    found = hashlib.sha256()
    left = file.seek(0, os.SEEK_END) if size is None else size
    file.seek(0)
    while left > 0 and (block := file.read(min(left, 2**20))):
        found.update(block)
        left -= len(block)
    return found.hexdigest()


def _compare(found: str, sealed: str, what: str = "its content") -> None:
    if found != sealed:
        raise DamagedCheckpoint(f"{what} is not what was written")


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise DamagedCheckpoint(f"its archive is damaged ({error})") from error
    if bad is not None:
        raise DamagedCheckpoint(f"{bad!r} in its archive is not what was written")


# -------------------------------------------------------------------- folders


def _seal_folder(path: Path, label: Label) -> None:
    files: dict[str, Any] = {}
    for file in _files(path):
        with open(file, "rb") as opened:
            digest = _digest(opened)
            os.fsync(opened.fileno())
        files[str(file.relative_to(path))] = {"bytes": file.stat().st_size, "sha256": digest}
    text = json.dumps({"label": label, "files": files}, indent=1)
    with open(path / FOLDER_SEAL, "w", encoding="utf-8") as seal_file:
        seal_file.write(text)
        seal_file.flush()
        os.fsync(seal_file.fileno())


def _check_folder(path: Path) -> None:
    if not (path / FOLDER_SEAL).exists() and (path / _INDEX).is_file():
        return  # one that Lightning alone has written: nothing to compare it with
    try:
        files = json.loads((path / FOLDER_SEAL).read_text(encoding="utf-8"))["files"]
        expected = {name: (facts["bytes"], facts["sha256"]) for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"its {FOLDER_SEAL} is missing or damaged") from error
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise DamagedCheckpoint(f"{name!r} is missing or was cut off")
        with open(file, "rb") as opened:
            _compare(_digest(opened), digest, repr(name))


def _files(path: Path) -> list[Path]:
    found = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in found if file.name != FOLDER_SEAL)
