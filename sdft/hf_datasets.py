"""Rows of Hugging Face `datasets`: from the hub, from local files, or from a saved folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sdft.hub import load_failure
from sdft.jsonl import Record

DataFiles = str | list[str] | dict[str, str]


@dataclass(frozen=True)
class DatasetSource:
    """Where a dataset lies; loaded when it is first read.

    Attributes:
        path: A hub name, a builder (`json`, `csv`, `parquet`), a folder of data files, or a folder
            that `save_to_disk` wrote.
        subset: The configuration of a dataset that has several.
        data_files: Files for a builder, as `load_dataset` takes them.

    Raises:
        ValueError: The builder for pickles.
    """

    path: str
    subset: str | None = None
    data_files: DataFiles | None = None

    def __post_init__(self) -> None:
        if self.path == "pandas":
            raise ValueError(
                "dataset 'pandas': this builder reads pickles, which may run code; save the table "
                "as parquet or CSV"
            )

    def __str__(self) -> str:
        subset = f" (subset {self.subset!r})" if self.subset else ""
        files = f" (data files {self.data_files!r})" if self.data_files else ""
        return f"dataset {self.path!r}{subset}{files}"

    def __contains__(self, split: str) -> bool:
        return split in self._splits

    def rows(self, split: str) -> Iterator[tuple[str, Record]]:
        """Read a split as pairs (place, row).

        Class labels become their names, and numbers texts (a CSV table does not tell them apart).

        Args:
            split: A split of the dataset, or a slice of one (`train[:90%]`).

        Raises:
            ValueError: The dataset cannot be loaded, or has no such split.
        """
        table = self._splits[split] if split in self else self._slice(split)
        place = f"{self}, split {split!r}"
        for index, row in enumerate(table):
            yield (
                f"{place}, row {index}",
                {field: _readable(value, table.features[field]) for field, value in row.items()},
            )

    @cached_property
    def _splits(self) -> Mapping[str, Any]:
        loaded = self._load()
        # A single table saved by itself has no named splits.
        return loaded if isinstance(loaded, Mapping) else {"train": loaded}

    def _slice(self, split: str) -> Any:
        if "[" not in split or _is_saved(self.path):
            raise ValueError(
                f"{self} has no split {split!r}; it has: "
                + ", ".join(repr(name) for name in self._splits)
            )
        return self._load(split)

    def _load(self, split: str | None = None) -> Any:
        import datasets  # takes a second to import: only when a dataset is read

        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # would call home, for local files too
        try:
            if _is_saved(self.path):
                return datasets.load_from_disk(self.path)
            return datasets.load_dataset(
                self.path, self.subset, data_files=self.data_files, split=split
            )
        # An IndexError is how `datasets` meets a saved table without rows.
        except (OSError, ValueError, IndexError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"cannot load {self}: {load_failure(error)}") from error


def _is_saved(path: str) -> bool:
    markers = ("dataset_dict.json", "state.json")
    return any((Path(path) / marker).is_file() for marker in markers)


def _readable(value: Any, feature: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if hasattr(feature, "int2str"):  # a class label; -1 stands for an unknown one
        return feature.int2str(value) if value >= 0 else None
    return str(value)
