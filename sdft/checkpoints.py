"""The checkpoints of a run on disk: which there are, which is the newest that is whole."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdft.atomic import remove, sync_folder, temporary_path
from sdft.folder_seal import DamagedCheckpoint, is_folder_checkpoint
from sdft.ranks import agreed, rank
from sdft.seal import check_content, read_label

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
"""Where a run keeps them, below its own folder."""
LAST = "last.ckpt"
"""Another name of the newest one."""
AUTO = "auto"
"""What `--ckpt_path` is called by a command that both starts a run and goes on with it."""
_STEP = re.compile(r"step-(\d+)(\.old)?\.ckpt")
_STAGE = re.compile(r"stage-(\d+)-.+\.ckpt")
_OLD = ".old.ckpt"  # how the name of a folder ends while another takes its place
_WHOLE: set[tuple[tuple[str, int, int, int], ...]] = set()  # what this process has found whole


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: a file, or the folder of a sharded one.

    Attributes:
        path: Where it is.
        label: What its seal says: `written` in ns, `step`, `stage`, `task`, `scores`; empty for one
            without a seal.
    """

    path: Path
    label: dict[str, Any] = field(hash=False)

    @property
    def written(self) -> int:
        """When, in ns since 1970."""
        told = self.label.get("written")
        return int(told) if told is not None else self.path.stat().st_mtime_ns

    @property
    def is_step(self) -> bool:
        """Whether it stands for a step, not for a stage: the last of these are kept."""
        return _STEP.fullmatch(self.path.name) is not None

    @property
    def size(self) -> int:
        """Bytes."""
        if self.path.is_dir():
            return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        return self.path.stat().st_size

    def damage(self) -> str | None:
        """What is wrong with it; None when it is whole. Reads all of it, once per process."""
        try:
            key = _facts(self.path)
            if key not in _WHOLE:
                check_content(self.path)
                _WHOLE.add(key)
        except DamagedCheckpoint as error:
            return str(error)
        except OSError as error:
            return f"it cannot be read ({error.strerror or error})"
        return None


class CheckpointFolder:
    """A run's folder of checkpoints.

    Args:
        path: The folder, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def found(self) -> list[Checkpoint]:
        """All of them, the newest first; `last.ckpt` only where it is a checkpoint of its own."""
        names = sorted(self.path.glob("*.ckpt"), key=lambda path: path.name == LAST)
        known: dict[tuple[int, int], Checkpoint] = {}
        for path in names:
            own = path.name == LAST or _STEP.fullmatch(path.name) or _STAGE.fullmatch(path.name)
            if own and path.exists():  # a link may lead nowhere
                facts = path.stat()
                label = read_label(path) or {}
                known.setdefault((facts.st_dev, facts.st_ino), Checkpoint(path, label))
        return sorted(known.values(), key=lambda one: one.written, reverse=True)

    def newest(self, verify: bool = True) -> Checkpoint:
        """The newest one that is whole; those that are newer and damaged are warned of.

        Args:
            verify: Look whether it is whole; the newest one of all otherwise.

        Raises:
            ValueError: There is none.
        """
        told: list[str] = []
        for one in self.found():
            damage = one.damage() if verify else None
            if damage is None:
                for line in told:
                    log.warning("%s; taking the one before it: %s", line, one.path)
                return one
            told.append(f"the checkpoint {one.path} is damaged: {damage}")
        raise ValueError("; ".join(told) or f"there is no checkpoint in {self.path}")

    def before(self, path: Path) -> Checkpoint | None:
        """The newest one beside `path` that is whole."""
        others = (one for one in self.found() if not one.path.samefile(path))
        return next((one for one in others if one.damage() is None), None)

    # ---------------------------------------------------------------- writing

    def prepare(self) -> None:
        """Make the folder and write a probe into it.

        Raises:
            OSError: It cannot be made or written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        probe = temporary_path(self.path / "probe")
        probe.write_bytes(b"")
        probe.unlink()
        for old in self.path.glob(f"*{_OLD}"):  # a kill came between two renames
            if old.with_name(f"{old.name.removesuffix(_OLD)}.ckpt").exists():
                remove(old)

    def temporary(self, name: str) -> Path:
        """A name to write the checkpoint under."""
        return temporary_path(self.path / name)

    def put(self, temporary: Path, name: str, keep_steps: int) -> Path:
        """Give a complete checkpoint its name, make `last.ckpt` stand for it, remove old steps.

        Args:
            temporary: The file or folder, all of it on the disk.
            name: Its name.
            keep_steps: How many step checkpoints stay; those of stages all do.
        """
        path = self.path / name
        replace_checkpoint(temporary, path)
        self.point(path)
        sync_folder(self.path)
        steps = [one for one in self.found() if one.is_step]
        for one in steps[keep_steps:]:
            remove(one.path)
        return path

    def point(self, path: Path) -> None:
        """Make `last.ckpt` another name of the checkpoint, atomically."""
        alias = temporary_path(self.path / LAST)
        last = self.path / LAST
        if last.is_dir() and not last.is_symlink():
            remove(last)
        try:
            alias.symlink_to(path.name)
        except OSError:  # a file system without symbolic links
            if path.is_dir():
                return  # nor is there another name for a folder
            os.link(path, alias)
        os.replace(alias, last)


def replace_checkpoint(temporary: Path, path: Path) -> None:
    """Give a complete checkpoint its name, which may be another one's.

    Args:
        temporary: The file or folder.
        path: Its name. A folder cannot be replaced at once: while another takes its place, its name
            ends in `.old.ckpt`.
    """
    old = path.with_name(f"{path.stem}{_OLD}")
    if path.exists() and (path.is_dir() or temporary.is_dir()):
        remove(old)
        os.rename(path, old)
    os.replace(temporary, path)
    remove(old)


def _facts(path: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What tells a file, or those of a folder, from what they are after a change."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(file.resolve()), file.stat()) for file in files]
    return tuple((name, s.st_ino, s.st_mtime_ns, s.st_size) for name, s in stats)


def check_checkpoint(path: Path) -> None:
    """Make sure that a checkpoint is what was written.

    Raises:
        DamagedCheckpoint: It is not; names the newest one beside it that is whole.
        FileNotFoundError: There is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    damage = Checkpoint(path, {}).damage()
    if damage is None:
        return
    other = CheckpointFolder(path.parent).before(path)
    offer = f"take the one before it: {other.path}" if other else "none beside it is whole"
    raise DamagedCheckpoint(f"the checkpoint {path} is damaged: {damage}; {offer}")


def agreed_checkpoint(path: Path) -> Path:
    """The checkpoint that the first process has found, whole: a collective call.

    The first one alone reads it to see that; an error is every process's.

    Raises:
        DamagedCheckpoint: It is not what was written.
        FileNotFoundError: There is none.
    """
    error: Exception | None = None
    if rank() == 0:
        try:
            check_checkpoint(path)
        except (DamagedCheckpoint, OSError) as found:
            error = found
    path, error = agreed((path, error))
    if error is not None:
        raise error
    return path


def find_checkpoint(path: str, root: Path, verify: bool = True) -> Path:
    """The checkpoint that `--ckpt_path` means, whole.

    Args:
        path: A checkpoint; a run's folder or its `last.ckpt`: the newest one that is whole; `last`
            or `auto`: that of the newest run under `root`; or a version (`stage-2-tools@1a2b3c4d`).
        root: `trainer.default_root_dir`.
        verify: Look whether it is whole. One process of a run does, and loads it for all.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    try:
        if path in ("last", AUTO):
            runs = sorted(_runs(root), key=lambda run: run.found()[0].written)
            if not runs:
                raise ValueError(f"no {FOLDER}/*.ckpt below {root}")
            return runs[-1].newest(verify).path
        place = Path(path) if "@" not in path or Path(path).exists() else _version(path, root)
        if place.name == LAST and place.parent.is_dir():
            return CheckpointFolder(place.parent).newest(verify).path
        if place.is_dir() and not is_folder_checkpoint(place):
            inner = place / FOLDER
            return CheckpointFolder(inner if inner.is_dir() else place).newest(verify).path
        if verify:
            check_checkpoint(place)
        return place
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"--ckpt_path {path}: {error}") from error


def _version(name: str, root: Path) -> Path:
    from sdft.gate.version import find_version  # which reads this module's folders

    return find_version(name, root).path


def start_of_run(path: str, root: Path, verify: bool = True) -> Path | None:
    """The same, and None for `auto` where no run is there to go on from (see `find_checkpoint`)."""
    if path == AUTO and next(_runs(root), None) is None:
        return None
    return find_checkpoint(path, root, verify)


def _runs(root: Path) -> Iterator[CheckpointFolder]:
    for path in root.rglob(FOLDER):
        if path.is_dir() and (folder := CheckpointFolder(path)).found():
            yield folder
