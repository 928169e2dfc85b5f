"""Shared by the tools that prepare the paper's skills: convert, de-duplicate, split, record.

Beside `train.jsonl`, `validation.jsonl` and `test.jsonl` each of them writes `prepared.json`: where
the records came from with their SHA-256, how many there are and were left out, the seed and the
command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sources import Source, has_split, read_source
from splits import Row, at_least, shared_out, write_jsonl

from sdft.atomic import atomic_write
from sdft.jsonl import Record, RecordFields

Convert = Callable[[Record], dict[str, Any] | None]
MANIFEST = "prepared.json"


@dataclass
class Left:
    """Records that were left out.

    Attributes:
        unwanted: Not of the kind that was asked for.
        unusable: Those that could not be converted, with their reasons.
    """

    unwanted: int = 0
    unusable: list[str] = field(default_factory=list)


def arguments(
    description: str, source: str | None, subset: str | None = None, split: str = "train"
) -> argparse.ArgumentParser:
    """A parser with the arguments that these tools share.

    Args:
        description: For `--help`.
        source: The default source; required when None.
        subset: Its configuration.
        split: Its split with the rows to share out.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--source",
        default=source,
        required=source is None,
        help=f"a .jsonl or .json file, a folder with train.jsonl, or a hub name ({source})",
    )
    parser.add_argument("--subset", help="configuration of a dataset")
    parser.add_argument("--split", default=split, help=f"split of a dataset ({split})")
    parser.add_argument(
        "--test-source", help="test rows of their own; --source has them by default"
    )
    parser.add_argument("--test-split", help="split of a dataset that holds the test rows")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--shares",
        type=at_least(0),
        nargs=3,
        default=[75, 5, 20],
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="percent; without TEST where the test rows are given (75 5 20)",
    )
    parser.add_argument("--seed", type=int, default=0, help="order and choice of rows (0)")
    parser.add_argument("--limit", type=at_least(1), help="at most so many rows to share out")
    parser.set_defaults(default_source=source, default_subset=subset)
    return parser


def sources(options: argparse.Namespace) -> tuple[Source, Source | None]:
    """The rows to share out, and the test rows where the source has its own.

    Raises:
        ValueError: Nothing there.
    """
    subset = options.subset
    if subset is None and options.source == options.default_source:
        subset = options.default_subset
    rows = read_source(options.source, options.split, subset)
    if options.test_source is not None:
        return rows, read_source(options.test_source, options.test_split or "test", subset)
    if options.test_split is not None or has_split(options.source, "test"):
        return rows, read_source(options.source, options.test_split or "test", subset)
    return rows, None


def convert_all(source: Source, convert: Convert, left: Left) -> list[Row]:
    """The records that can be used, as rows told apart by their prompts.

    Raises:
        ValueError: None can; names the first reason.
    """
    rows, reasons = [], []
    for place, record in source.records:
        try:
            converted = convert(record)
            if converted is None:
                left.unwanted += 1
                continue
            example = RecordFields().example(converted, place, training=True)
        except ValueError as error:
            reasons.append(f"{place}: {str(error).removeprefix(f'{place}: ')}")
            continue
        text = "\n".join(message["content"] for message in example.messages)
        rows.append(Row(text, "", place, converted))
    if not rows:
        raise ValueError(reasons[0] if reasons else f"{source.facts}: no record of that kind")
    left.unusable += reasons
    return rows


def prepare(
    options: argparse.Namespace, pair: tuple[Source, Source | None], convert: Convert
) -> None:
    """Write the splits and their manifest.

    Args:
        options: What `arguments` parses.
        pair: The rows to share out, and the test rows of their own.
        convert: Turns a record into prompt, answer and demonstration; None leaves it out.

    Raises:
        ValueError: No usable record, or too few.
    """
    left = Left()
    rows, test = pair
    found = convert_all(rows, convert, left)[: options.limit]
    tested = convert_all(test, convert, left) if test else []
    splits = shared_out(found, tested, tuple(options.shares), options.seed)
    kept = sum(map(len, splits.values()))
    counts = {
        "repeated": len(found) + len(tested) - kept,
        "unwanted": left.unwanted,
        "unusable": len(left.unusable),
    }
    written = {name: _write(options.out, name, own) for name, own in splits.items() if own}
    facts = [source.facts for source in (rows, test) if source]
    _write_manifest(options, facts, written, {**counts, "reasons": left.unusable[:10]})
    left_out = ", ".join(f"{count} {why}" for why, count in counts.items() if count)
    print(f"left out: {left_out or 'none'}" + "".join(f"\n  {r}" for r in left.unusable[:1]))


def _write(out: Path, split: str, rows: Sequence[Row]) -> dict[str, Any]:
    file = out / f"{split}.jsonl"
    count = write_jsonl(file, [row.record for row in rows])
    print(f"{file}: {count} rows")
    return {"rows": count, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _write_manifest(
    options: argparse.Namespace,
    facts: list[dict[str, Any]],
    splits: dict[str, Any],
    left_out: dict[str, Any],
) -> None:
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": options.seed,
        "shares": options.shares,
        "sources": facts,
        "splits": splits,
        "left_out": left_out,
    }
    with atomic_write(options.out / MANIFEST) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8")
