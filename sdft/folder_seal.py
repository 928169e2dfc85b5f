"""The seal of a folder: a file with the digest of every other one, and a label.

Every process of a run digests a part of the files, so that sealing takes no longer than writing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from sdft.ranks import gathered, rank, ranks

FOLDER_SEAL = "seal.json"
"""A sealed folder's digests and label."""
_INDEX = ".metadata"  # of a sharded checkpoint, as torch writes it
_BLOCK = 2**20
_THREADS = 8

Label = Mapping[str, Any]


class DamagedCheckpoint(ValueError):
    """A checkpoint is not what was written."""


def seal_folder(path: Path, label: Label) -> None:
    """Seal a folder that is complete, on the disk itself; a collective call.

    Args:
        path: On a disk that all processes see.
        label: Plain values.

    Raises:
        OSError: It cannot be read or written; in all processes, where one cannot read.
    """
    names = sorted(set().union(*gathered(_names(path))))  # a network's disk may show some late
    facts: dict[str, Any] | OSError
    try:
        facts = {name: _facts(path / name) for name in names[rank() :: ranks()]}
    except OSError as error:
        facts = error
    found = gathered(facts)
    for part in found:
        if isinstance(part, OSError):
            raise part
    if rank() == 0:
        files = {name: own for part in found for name, own in part.items()}  # type: ignore[union-attr]
        text = json.dumps({"label": label, "files": files}, indent=1)
        with open(path / FOLDER_SEAL, "w", encoding="utf-8") as seal_file:
            seal_file.write(text)
            seal_file.flush()
            os.fsync(seal_file.fileno())


def is_folder_checkpoint(path: Path) -> bool:
    """Whether a folder is a sharded checkpoint, and not one that holds checkpoints."""
    return (path / FOLDER_SEAL).is_file() or (path / _INDEX).is_file()


def read_folder_label(path: Path) -> dict[str, Any] | None:
    """The label of a sealed folder; None when it has no seal, or a damaged one."""
    try:
        found = json.loads((path / FOLDER_SEAL).read_text(encoding="utf-8"))["label"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def check_folder(path: Path) -> None:
    """Compare all files with the seal; of a folder without one, see that the index is there.

    Raises:
        DamagedCheckpoint: One is missing, was cut off or changed.
        OSError: One cannot be read.
    """
    if not (path / FOLDER_SEAL).exists() and (path / _INDEX).is_file():
        return  # one that Lightning alone has written: nothing to compare it with
    try:
        files = json.loads((path / FOLDER_SEAL).read_text(encoding="utf-8"))["files"]
        expected = {name: (facts["bytes"], facts["sha256"]) for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"its {FOLDER_SEAL} is missing or damaged") from error
    for name, (size, _) in expected.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise DamagedCheckpoint(f"{name!r} is missing or was cut off")
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _sha256(path / name), expected)
        for (name, (_, sealed)), sha256 in zip(expected.items(), found, strict=True):
            compare(sha256, sealed, repr(name))


def digest(file: IO[bytes], size: int | None = None) -> str:
    """SHA-256 of a file's first bytes, or of all."""
    found = hashlib.sha256()
    left = file.seek(0, os.SEEK_END) if size is None else size
    file.seek(0)
    while left > 0 and (block := file.read(min(left, _BLOCK))):
        found.update(block)
        left -= len(block)
    return found.hexdigest()


def compare(found: str, sealed: str, what: str = "its content") -> None:
    """Compare two digests.

    Raises:
        DamagedCheckpoint: They differ.
    """
    if found != sealed:
        raise DamagedCheckpoint(f"{what} is not what was written")


def _facts(file: Path) -> dict[str, Any]:
    with open(file, "rb") as opened:
        sha256 = digest(opened)
        os.fsync(opened.fileno())
        return {"bytes": opened.seek(0, os.SEEK_END), "sha256": sha256}


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return digest(opened)


def _names(path: Path) -> list[str]:
    found = (file for file in path.rglob("*") if file.is_file())
    return [str(file.relative_to(path)) for file in found if file.name != FOLDER_SEAL]
