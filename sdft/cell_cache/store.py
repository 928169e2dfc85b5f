"""A folder of cells: a small file each, whole or not there."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from sdft.atomic import atomic_write
from sdft.cell_cache.facts import Facts, digest
from sdft.metrics import Cell

log = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """What was measured.

    Attributes:
        cell: The cell.
        base_ids: Tokens of the base's responses that the divergence is measured along, where they
            were made on the way.
    """

    cell: Cell
    base_ids: list[list[int]] | None = None


class CellStore:
    """Finds entries by facts; several processes and runs may share it.

    Args:
        folder: Made when the first entry is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, facts: Facts) -> Entry | None:
        """The entry of exactly these facts; a damaged file is none."""
        file = self._file(facts)
        try:
            content = json.loads(file.read_text("utf-8"))
            if content["format"] != FORMAT or digest(content["facts"]) != digest(facts):
                return None
            return Entry(Cell.from_dict(content["cell"]), content["base_ids"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is no entry of the cell cache, and is measured anew: %r", file, error)
            return None

    def keep(self, facts: Facts, entry: Entry) -> None:
        """Keep an entry; a folder that cannot be written costs a warning alone."""
        content = {
            "format": FORMAT,
            "facts": facts,
            "cell": entry.cell.to_dict(),
            "base_ids": entry.base_ids,
        }
        file = self._file(facts)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(content, allow_nan=False) + "\n", "utf-8")
        except OSError as error:
            log.warning("retention.cache: %s cannot be written: %s", file, error)

    def _file(self, facts: Facts) -> Path:
        key = digest(facts)
        return self.folder / key[:2] / f"{key}.json"
