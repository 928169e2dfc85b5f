"""What became of each stage: `python -m sdft history --dir lightning_logs`.

Lists every stage that the runs below a folder have finished, the oldest first, by a name that means
the same content for ever (`stage-2-tools@1a2b3c4d`), with its scores and what the gate decided.
Any of them can be exported (`python -m sdft export --ckpt NAME`), gone on from (`--ckpt_path NAME`)
or rolled back to (`--rollback NAME`). Nothing is deleted.
"""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from sdft.checkpoints import FOLDER
from sdft.gate.ledger import Entry, read_ledger
from sdft.gate.rollback import restore, withdraw_after
from sdft.gate.version import Version, find_version, versions

_HEADS = ("version", "decision", "written", "run", "step", "try", "scores")


def main(args: list[str]) -> int:
    """List the stages, or roll back; the exit status is 1 where there is none.

    Args:
        args: Command-line arguments behind `history`.

    Raises:
        ValueError: No such version.
    """
    given = _parser().parse_args(args)
    root = Path(given.dir)
    if given.rollback is not None:
        return _roll_back(find_version(given.rollback, root))
    rows = _records(root)
    if given.json:
        print(json.dumps(rows, indent=1))
    elif rows:
        print(_table(rows))
    else:
        print(f"no finished stage below {root.absolute()}")
    return 0 if rows else 1


def _roll_back(version: Version) -> int:
    good = restore(version.path)
    moved = withdraw_after(good.parent, good)
    label = version.label
    Entry(
        "rolled back",
        version.name,
        int(label.get("stage", 0)) + 1,
        str(label.get("task", "?")),
        1,
        int(label.get("step", 0)),
        dict(label.get("scores") or {}),
        ["asked for by hand"],
        str(good),
        time.time(),
    ).append_to(version.run)
    for path in moved:
        print(f"put aside: {path}")
    print(f"back at {good}: go on with --ckpt_path {good}")
    return 0


def _records(root: Path) -> list[dict[str, Any]]:
    """Every stage, and every decision that was about none that is kept."""
    found = versions(root)
    ledgers = {run: read_ledger(run) for run in _runs(root)}
    decided = {e.version: e for entries in ledgers.values() for e in entries if "@" in e.version}
    rows = [_of_version(one, decided.get(one.name)) for one in found]
    for run, entries in ledgers.items():
        rows += [_of_entry(e, run) for e in entries if "@" not in e.version]
    return sorted(rows, key=lambda row: float(row["written"]))


def _runs(root: Path) -> list[Path]:
    folders = [root] if root.name == FOLDER else root.rglob(FOLDER)
    return sorted({folder.parent for folder in folders})


def _of_version(one: Version, entry: Entry | None) -> dict[str, Any]:
    decision: str = "not judged" if entry is None else entry.decision
    if one.withdrawn and decision not in ("rejected", "rolled back"):
        decision += ", put aside"
    return {
        "version": one.name,
        "decision": decision,
        "written": one.written / 1e9,
        "run": str(one.run),
        "path": str(one.path),
        "step": one.label.get("step"),
        "attempt": None if entry is None else entry.attempt,
        "scores": dict(one.label.get("scores") or {}),
        "reasons": [] if entry is None else entry.reasons,
    }


def _of_entry(entry: Entry, run: Path) -> dict[str, Any]:
    return {
        "version": entry.version,
        "decision": f"{entry.decision} on the way",
        "written": entry.time,
        "run": str(run),
        "path": None,
        "step": entry.step,
        "attempt": entry.attempt,
        "scores": entry.scores,
        "reasons": entry.reasons,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [_HEADS, *map(_line, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADS))]
    text = []
    for place, line in enumerate(lines):
        cells = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        text.append("  ".join(cells).rstrip())
        text += [f"    {reason}" for reason in (rows[place - 1]["reasons"] if place else [])]
    return "\n".join(text)


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    scores = ", ".join(
        f"{name} {'–' if score is None else format(score, '.2f')}"
        for name, score in row["scores"].items()
    )
    return (
        row["version"],
        row["decision"],
        datetime.fromtimestamp(row["written"]).strftime("%Y-%m-%d %H:%M:%S"),
        Path(row["run"]).name,
        "?" if row["step"] is None else str(row["step"]),
        "" if row["attempt"] is None else str(row["attempt"]),
        scores,
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="sdft history", description=__doc__)
    parser.add_argument(
        "--dir", type=str, default=".", help="a run's folder, or one that holds several runs"
    )
    parser.add_argument(
        "--rollback",
        type=str | None,
        metavar="VERSION",
        help="make this stage what its run goes on from; later checkpoints are put aside",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
