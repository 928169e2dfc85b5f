"""Tasks whose records come in a format of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any, get_args

from sdft.hf_datasets import DatasetSource
from sdft.jsonl import Record, RecordFields, read_jsonl
from sdft.scorers import Scorer
from sdft.tasks import RecordTask, Split

File = str | PathLike[str]


class ConvertedTask(RecordTask):
    """A task that turns each record into one with `prompt`, `answer` and `demonstration`.

    Subclasses say how. Records come from a JSONL file per split, or from a dataset.

    Raises:
        ValueError: Both files and a dataset, or settings of a dataset without one.
    """

    def __init__(
        self,
        name: str,
        scorer: Scorer,
        files: Mapping[Split, File | None],
        path: str | None,
        subset: str | None,
        splits: dict[str, str] | None,
        limit: int | None,
        steps: int | None,
        epochs: int | None,
    ) -> None:
        super().__init__(name, scorer, RecordFields(), limit, steps, epochs)
        given = sorted(split for split, file in files.items() if file is not None)
        if path is not None and given:
            raise ValueError(f"task {name!r}: give files ({', '.join(given)}) or path, not both")
        if path is None and (subset or splits):
            raise ValueError(f"task {name!r}: subset and splits belong to a dataset: give its path")
        unknown = sorted(set(splits or ()) - set(get_args(Split)))
        if unknown:
            raise ValueError(f"task {name!r}: splits must be of {get_args(Split)}, found {unknown}")
        self.files = files
        self.source = None if path is None else DatasetSource(path, subset)
        self.splits = splits

    @abstractmethod
    def convert(self, record: Record) -> Record:
        """A record with the fields that `RecordFields` reads.

        Raises:
            ValueError: A field is missing or of the wrong kind.
        """

    def records(self, split: Split) -> Iterator[tuple[str, Record]]:
        """The converted records of a split with their places."""
        for place, record in self._raw(split):
            try:
                yield place, self.convert(record)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error

    def _raw(self, split: Split) -> Iterator[tuple[str, Record]]:
        if self.source is None:
            file = self.files[split]
            return iter(()) if file is None else read_jsonl(file)
        if self.splits is None:
            return self.source.rows(split) if split in self.source else iter(())
        return self.source.rows(self.splits[split]) if split in self.splits else iter(())


def first_text(record: Record, *fields: str) -> str | None:
    """The first of these fields that holds a text which is not empty."""
    return next((v for f in fields if isinstance(v := record.get(f), str) and v.strip()), None)


def needed(value: Any, record: Record, *fields: str) -> Any:
    """`value`, which one of the fields should have given.

    Raises:
        ValueError: There is none; names the fields.
    """
    if value is None:
        wanted = " or ".join(map(repr, fields))
        raise ValueError(f"no field {wanted}; fields found: {', '.join(map(repr, record))}")
    return value
