"""Shared by the tools `prepare_*`: read a source, keep its splits disjoint, write JSON Lines."""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft.atomic import atomic_write
from sdft.jsonl import Record, read_jsonl


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        text: What the user says; it tells rows apart.
        label: The class that sizes are counted by.
        place: "FILE, line N", for error messages.
        record: All of its fields.
    """

    text: str
    label: str
    place: str
    record: Record


@dataclass(frozen=True)
class Sizes:
    """Rows per label; None keeps all.

    Attributes:
        train: Training rows, after the validation rows are taken out.
        validation: Rows taken out of the training rows.
        test: Test rows.
    """

    train: int | None
    validation: int
    test: int | None


def read_rows(file: Path, text: str, label: str) -> list[Row]:
    """All rows of a JSONL file.

    Args:
        file: One object per line.
        text: The field with the user's text.
        label: The field with the class.

    Raises:
        ValueError: The file is missing, or a line has no such text field; names file and line.
    """
    rows = []
    for place, record in read_jsonl(file):
        for name in (text, label):
            value = record.get(name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{place}: no text in field {name!r}; fields: {sorted(record)}")
        rows.append(Row(record[text].strip(), record[label], place, record))
    return rows


def normalised(text: str) -> str:
    """The form in which two texts count as the same: no case, single spaces."""
    return " ".join(text.casefold().split())


def without_repeats(rows: Iterable[Row], taken: Iterable[Row] = ()) -> list[Row]:
    """The rows whose text stands neither in an earlier row nor in `taken`."""
    seen = {normalised(row.text) for row in taken}
    kept = []
    for row in rows:
        key = normalised(row.text)
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return kept


def disjoint_splits(
    train: Sequence[Row], test: Sequence[Row], sizes: Sizes, seed: int
) -> dict[str, list[Row]]:
    """Train, validation and test rows that share no text, each in a random order.

    A text of the test file never trains; validation rows come out of the training file.

    Raises:
        ValueError: A label has too few training rows for the validation rows asked for.
    """
    tested = without_repeats(test)
    trained = without_repeats(train, taken=tested)
    rng = random.Random(seed)
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for label, rows in _by_label(trained, rng).items():
        if len(rows) <= sizes.validation:
            raise ValueError(
                f"{Path(rows[0].place).parent}: {label!r} has {len(rows)} training rows: too few "
                f"to take {sizes.validation} of them for validation and leave some (--validation)"
            )
        held, rest = rows[: sizes.validation], rows[sizes.validation :]
        splits["validation"] += held
        splits["train"] += rest[: sizes.train]
    for rows in _by_label(tested, rng).values():
        splits["test"] += rows[: sizes.test]
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def shared_out(
    rows: Sequence[Row], test: Sequence[Row], shares: tuple[int, int, int], seed: int
) -> dict[str, list[Row]]:
    """Train, validation and test rows by shares, no text twice, each in a random order.

    Args:
        rows: Rows to share out; texts of `test` are left out.
        test: The test rows, where the source has its own: then the third share is not taken.
        shares: Of training, validation and test, in percent.
        seed: Shuffles.

    Raises:
        ValueError: Shares that are no percentages, or too few rows to give every split one.
    """
    if min(shares) < 0 or sum(shares) != 100 or not shares[0]:
        raise ValueError(f"shares must be three percentages that sum to 100, found {shares}")
    rng = random.Random(seed)
    tested = without_repeats(test)
    rest = without_repeats(rows, taken=tested)
    rng.shuffle(tested)
    rng.shuffle(rest)
    train, validation, held = shares if not tested else (shares[0], shares[1], 0)
    whole = train + validation + held
    # A split that has a share has a row.
    sizes = [max(1, round(len(rest) * part / whole)) if part else 0 for part in (held, validation)]
    if sum(sizes) >= len(rest):
        raise ValueError(f"{len(rest)} rows are too few to be shared out {shares}")
    return {
        "train": rest[sum(sizes) :],
        "validation": rest[sizes[0] : sum(sizes)],
        "test": tested or rest[: sizes[0]],
    }


def _by_label(rows: Sequence[Row], rng: random.Random) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.label].append(row)
    for group in groups.values():
        rng.shuffle(group)
    return dict(sorted(groups.items()))


def write_jsonl(file: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write records one per line, atomically; returns how many.

    Raises:
        ValueError: There is no record.
    """
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    if not lines:
        raise ValueError(f"{file}: nothing to write")
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def at_least(smallest: int) -> Callable[[str], int]:
    """A command-line type: a whole number of at least `smallest`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"needs a whole number >= {smallest}, found {text!r}")
        return int(text)

    return number


def arguments(description: str, validation: int) -> argparse.ArgumentParser:
    """A parser with the arguments that every tool has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--source", type=Path, required=True, help="train.jsonl and test.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="order and choice of rows")
    parser.add_argument("--train", type=at_least(1), help="most training rows per label (all)")
    parser.add_argument(
        "--validation",
        type=at_least(1),
        default=validation,
        help="rows per label taken from training",
    )
    parser.add_argument("--test", type=at_least(1), help="most test rows per label (all)")
    return parser


def run(write: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse the command line and write; a bad source ends with one line, not a traceback."""
    options = parser.parse_args()
    try:
        write(options)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
