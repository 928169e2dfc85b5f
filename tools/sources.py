"""Where the tools `prepare_*` take records from: local files or the hub; with checksums."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft.hf_datasets import DatasetSource
from sdft.jsonl import Record, read_jsonl

Places = list[tuple[str, Record]]


@dataclass(frozen=True)
class Source:
    """Records with their places, and what is worth knowing about where they come from.

    Attributes:
        records: Pairs of "FILE, line N" and a record.
        facts: For the manifest: what was read, how many records, and its SHA-256.
    """

    records: Places
    facts: dict[str, Any]


def read_source(name: str, split: str, subset: str | None = None) -> Source:
    """Read all records of a local file, a folder, or a dataset of the hub.

    Args:
        name: A `.jsonl` or `.json` file; a folder with `SPLIT.jsonl`, or with data files that
            `datasets` reads; or a hub name `OWNER/NAME`.
        split: Which split of a folder or a dataset.
        subset: The configuration of a dataset that has several.

    Raises:
        ValueError: Nothing there, or nothing that can be read.
    """
    path = Path(name)
    if (path / f"{split}.jsonl").is_file():
        path = path / f"{split}.jsonl"
    if path.is_file():
        records = list(_json_records(path) if path.suffix == ".json" else read_jsonl(path))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return Source(records, {"file": str(path), "records": len(records), "sha256": digest})
    named = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and path.suffix not in (".json", ".jsonl")
    if not path.is_dir() and not named:
        raise ValueError(f"{path.absolute()}: no such file or folder")
    records = list(DatasetSource(name, subset).rows(split))
    facts = {"dataset": name, "subset": subset, "split": split, "records": len(records)}
    return Source(records, {**facts, "sha256": records_digest(records)})


def has_split(name: str, split: str) -> bool:
    """Whether a local folder has a file for a split."""
    return (Path(name) / f"{split}.jsonl").is_file()


def _json_records(path: Path) -> Iterator[tuple[str, Record]]:
    """A list of objects in one JSON file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON: {error}") from error
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise ValueError(f"{path}: must hold a list of objects")
    for index, item in enumerate(content):
        yield f"{path}, entry {index}", item


def records_digest(records: Places) -> str:
    """SHA-256 of records in their order, whatever file format they came in."""
    digest = hashlib.sha256()
    for _, record in records:
        digest.update(json.dumps(record, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def expanded(source: Source, several: Callable[[Record], list[Record]]) -> Source:
    """A source each of whose records holds several."""
    records = []
    for place, record in source.records:
        try:
            records += [(f"{place}, item {i}", own) for i, own in enumerate(several(record))]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{place}: {error}") from error
    return Source(records, source.facts)
