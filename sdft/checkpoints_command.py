"""The checkpoints of a run: `python -m sdft checkpoints --dir lightning_logs/version_0`.

Lists them, the newest first, with the stage and step that each stands for, its size, whether its
content is what was written, and the scores measured last; nothing of them is loaded.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

from jsonargparse import ArgumentParser

from sdft.checkpoints import FOLDER, Checkpoint, CheckpointFolder

_HEADS = ("checkpoint", "written", "stage", "step", "size", "content", "scores")


def main(args: list[str]) -> int:
    """Print the list; the exit status is 1 where none is whole, 2 where there is none.

    Args:
        args: Command-line arguments behind `checkpoints`.
    """
    given = _parser().parse_args(args)
    folders = [CheckpointFolder(path) for path in _folders(Path(given.dir))]
    found = [(folder, one) for folder in folders for one in folder.found()]
    if not found:
        print(f"sdft: error: no {FOLDER}/*.ckpt in {given.dir}", file=sys.stderr)
        return 2
    damages = {one.path: one.damage() if given.check else None for _, one in found}
    for folder in folders:
        own = folder.found()
        if own:
            print(f"{folder.path}\n{_table([_row(one, damages[one.path]) for one in own])}")
    return 0 if None in damages.values() else 1


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="sdft checkpoints", description=__doc__)
    parser.add_argument(
        "--dir", type=str, default=".", help="a run's folder, or one that holds several runs"
    )
    parser.add_argument(
        "--check", type=bool, default=True, help="read every checkpoint to see whether it is whole"
    )
    return parser


def _folders(path: Path) -> list[Path]:
    if path.name == FOLDER:
        return [path]
    return sorted(place for place in path.rglob(FOLDER) if place.is_dir())


def _row(one: Checkpoint, damage: str | None) -> tuple[str, ...]:
    label = one.label
    written = datetime.fromtimestamp(one.written / 1e9).strftime("%Y-%m-%d %H:%M:%S")
    stage = f"{label['stage'] + 1}/{label['stages']} {label['task']}" if "task" in label else "?"
    scores = label.get("scores") or {}
    told = ", ".join(f"{k} {'–' if v is None else format(v, '.2f')}" for k, v in scores.items())
    content = "damaged: " + damage if damage else "whole" if label else "whole, unsealed"
    return (
        one.path.name,
        written,
        stage,
        str(label.get("step", "?")),
        f"{one.size / 1e6:.1f} MB",
        content,
        told,
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    table = [_HEADS, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEADS))]
    lines = (
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in table
    )
    return "\n".join(f"  {line.rstrip()}" for line in lines)
