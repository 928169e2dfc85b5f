"""A stage's checkpoint by a name that means the same content for ever: `stage-2-tools@1a2b3c4d`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft.checkpoints import FOLDER
from sdft.seal import read_digest, read_label

WITHDRAWN = "withdrawn-"
"""How the names of checkpoints begin that a rollback has put aside."""
_STAGE = re.compile(rf"(?:{WITHDRAWN})?(?P<name>stage-(?P<stage>\d+)-.+?)(\.\d+)?\.ckpt")
_DIGITS = 8


@dataclass(frozen=True)
class Version:
    """One stage, as a run left it.

    Attributes:
        name: `stage-<number>-<task>@<the beginning of its content's digest>`.
        path: The checkpoint, a file or a folder.
        label: What its seal says: step, stage, task, scores, when it was written.
    """

    name: str
    path: Path
    label: dict[str, Any]

    @property
    def withdrawn(self) -> bool:
        """Whether a rollback has put it aside."""
        return self.path.name.startswith(WITHDRAWN)

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.path.parent.parent

    @property
    def written(self) -> int:
        """When, in ns since 1970."""
        return int(self.label.get("written") or self.path.stat().st_mtime_ns)

    @classmethod
    def of(cls, path: Path) -> Version | None:
        """The version that a checkpoint is; None for one that stands for no stage, or unsealed."""
        found, digest = _STAGE.fullmatch(path.name), read_digest(path)
        if found is None or digest is None:
            return None
        return cls(f"{found['name']}@{digest[:_DIGITS]}", path, read_label(path) or {})


def versions(root: Path) -> list[Version]:
    """All versions of the runs below a folder, the oldest first."""
    return sorted(_found(root), key=lambda one: one.written)


def _found(root: Path) -> Iterator[Version]:
    folders = [root] if root.name == FOLDER else root.rglob(FOLDER)
    for folder in folders:
        for path in folder.glob("*.ckpt"):
            if not path.is_symlink() and (version := Version.of(path)) is not None:
                yield version


def find_version(name: str, root: Path) -> Version:
    """The version of a name below a folder; the digest may be cut short where it is unambiguous.

    Raises:
        ValueError: There is none, or there are several.
    """
    stem, _, digest = name.partition("@")
    known = versions(root)
    found = [v for v in known if v.name.startswith(f"{stem}@{digest}")]
    if len({v.name for v in found}) == 1:
        return found[-1]
    which = "several fit" if found else "there is none"
    names = ", ".join(v.name for v in (found or known)) or "none"
    raise ValueError(f"version {name!r} below {root}: {which}; known: {names}")
