"""Going back to an earlier checkpoint of a run: the later ones are put aside, none is deleted."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from sdft.atomic import sync_folder
from sdft.checkpoints import LAST, CheckpointFolder
from sdft.gate.version import WITHDRAWN


def withdraw_after(folder: Path, good: Path | None) -> list[Path]:
    """Put aside all checkpoints of a folder that are newer than one, which becomes the last.

    Args:
        folder: A run's `checkpoints`.
        good: What to go back to; None for the start: all are put aside.

    Returns:
        The new names of what was put aside.
    """
    kept = CheckpointFolder(folder)
    moved = []
    limit = None
    found = kept.found()
    if good is not None:
        limit = next((one.written for one in found if one.path.samefile(good)), None)
    for one in found:
        if good is not None and one.path.samefile(good):
            continue
        if good is not None and limit is not None and one.written <= limit:
            continue
        moved.append(_put_aside(one.path))
    last = folder / LAST
    if good is not None and good.parent.samefile(folder):
        kept.point(good)
    elif last.is_symlink() or last.exists():
        last.unlink(missing_ok=True)
    sync_folder(folder)
    return moved


def restore(path: Path) -> Path:
    """Give a checkpoint that was put aside its own name again; returns it."""
    if not path.name.startswith(WITHDRAWN):
        return path
    found = re.fullmatch(rf"{WITHDRAWN}(.+?)(\.\d+)?\.ckpt", path.name)
    assert found is not None
    target = path.with_name(f"{found[1]}.ckpt")
    if target.exists():
        _put_aside(target)  # another attempt at the same stage
    os.rename(path, target)
    return target


def _put_aside(path: Path) -> Path:
    """Give a checkpoint a name that no run goes on from."""
    target = path.with_name(f"{WITHDRAWN}{path.name}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{WITHDRAWN}{path.stem}.{number}.ckpt")
    os.rename(path, target)
    return target


def stage_checkpoint(folders: Sequence[Path], stage: int) -> Path | None:
    """The checkpoint of a finished stage, in the first folder that has one.

    Args:
        folders: Folders of checkpoints.
        stage: From 0.
    """
    for folder in folders:
        found = sorted(folder.glob(f"stage-{stage + 1}-*.ckpt"))
        if found:
            return found[-1]
    return None


def go_back(own: Path, good: Path | None) -> None:
    """Make the last accepted stage what a run goes on from, here and where it was resumed from.

    Args:
        own: The run's folder of checkpoints.
        good: The stage's checkpoint, in this folder or another; None for the start.
    """
    is_own = good is not None and own.exists() and good.parent.samefile(own)
    if good is not None and good.exists() and not is_own:
        withdraw_after(good.parent, good)
    if own.exists():
        withdraw_after(own, good if is_own else None)
