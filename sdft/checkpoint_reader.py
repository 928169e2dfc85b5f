"""Checkpoints as values: whole files and sharded folders, read without running what they hold.

A checkpoint is a pickle, and a pickle can run code when it is read. Everything here reads with
`weights_only`, which lets plain values and tensors through and nothing else.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdft.shard_reader import FACTS, INDEX, check_values, read_index, read_tensors

PARTS = ("student", "teacher")
"""The models that a checkpoint may hold."""
_WEIGHTS = ("state_dict", "model")  # where Lightning's strategies keep the module's state
_BLOCKED = re.compile(r"GLOBAL\s+([\w.]+)")


class Checkpoint(ABC):
    """A checkpoint on disk.

    Attributes:
        path: The file or folder.
        facts: Everything but weights and optimizer: identity, step, callbacks' states.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            self.facts = self._read_facts()
        if not isinstance(self.facts.get("sdft"), dict):
            raise ValueError(f"{path} was not written by sdft: it names no model")

    @property
    def parts(self) -> list[str]:
        """Which of student and teacher it holds."""
        with reading(self.path):
            names = self._names()
        return [part for part in PARTS if any(name.startswith(f"{part}.") for name in names)]

    def weights(self, part: str) -> dict[str, Tensor]:
        """The state of one model, on the CPU, as it was saved.

        Args:
            part: `student` or `teacher`.

        Raises:
            ValueError: It is not there, or damaged.
        """
        if part not in self.parts:
            raise ValueError(
                f"{self.path} holds no {part}, only: {', '.join(self.parts) or 'neither'} "
                f"(method {self.facts['sdft'].get('method')!r})"
            )
        with reading(self.path):
            return self._read_weights(f"{part}.")

    def sha256(self) -> str:
        """Of the file; of a folder, of the lines that `sha256sum` prints for its files, by name."""
        if self.path.is_file():
            return _sha256(self.path)
        files = sorted(file.name for file in self.path.iterdir() if file.is_file())
        lines = "".join(f"{_sha256(self.path / name)}  {name}\n" for name in files)
        return hashlib.sha256(lines.encode()).hexdigest()

    @abstractmethod
    def _read_facts(self) -> dict[str, Any]: ...

    @abstractmethod
    def _names(self) -> list[str]: ...

    @abstractmethod
    def _read_weights(self, root: str) -> dict[str, Tensor]: ...


class WholeCheckpoint(Checkpoint):
    """A `.ckpt` file."""

    def _read_facts(self) -> dict[str, Any]:
        content = _load(self.path)
        self._state: dict[str, Tensor] = content.pop("state_dict")
        content.pop("optimizer_states", None)
        return content

    def _names(self) -> list[str]:
        return list(self._state)

    def _read_weights(self, root: str) -> dict[str, Tensor]:
        with zipfile.ZipFile(self.path) as archive:
            if (record := archive.testzip()) is not None:
                raise ValueError(f"{record} does not fit its checksum")
        own = {name: value for name, value in self._state.items() if name.startswith(root)}
        return {name.removeprefix(root): value for name, value in own.items()}


class ShardedCheckpoint(Checkpoint):
    """A folder with a part of every process."""

    def _read_facts(self) -> dict[str, Any]:
        return _load(self.path / FACTS)

    def _names(self) -> list[str]:
        return list(self._roots())

    def _read_weights(self, root: str) -> dict[str, Tensor]:
        prefix = next(prefix for name, prefix in self._roots().items() if name.startswith(root))
        return read_tensors(self.path, f"{prefix}.{root}")

    def _roots(self) -> dict[str, str]:
        """Name within the module → what stands before it."""
        keys = (key.partition(".") for key in read_index(self.path).state_dict_metadata)
        return {name: prefix for prefix, _, name in keys if prefix in _WEIGHTS}


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a whole or a sharded checkpoint.

    Raises:
        ValueError: None of ours, damaged, or one that would run code; names it.
    """
    if path.is_dir():
        if not (path / INDEX).is_file() or not (path / FACTS).is_file():
            raise ValueError(f"{path} is a folder without {INDEX} and {FACTS}: no whole checkpoint")
        return ShardedCheckpoint(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged or no checkpoint (its archive has no end)")
    return WholeCheckpoint(path)


def check_harmless(path: Path) -> None:
    """Read a checkpoint once without running code, before something less careful reads it.

    Lightning's strategies for shards unpickle a folder's index, and FSDP1's a whole file. Weights
    stay on disk.

    Raises:
        ValueError: It would run code, or is damaged.
    """
    with reading(path):
        if path.is_dir():
            _load(path / FACTS)
            check_values(path)
        else:
            _load(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what torch raises over a bad checkpoint into one clear error."""
    try:
        yield
    except Exception as error:  # damaged archives raise anything
        cause: BaseException | None = error
        blocked = None
        while cause is not None and blocked is None:
            blocked = isinstance(cause, pickle.UnpicklingError) and _BLOCKED.search(str(cause))
            cause = cause.__cause__ or cause.__context__
        if blocked:
            raise ValueError(
                f"{path} is no checkpoint of plain values: it names {blocked[1]}, which could run "
                "code; nothing of it was run"
            ) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} is damaged or no checkpoint: {reason}") from error


def _load(path: Path) -> dict[str, Any]:
    content = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, no checkpoint")
    return content


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
