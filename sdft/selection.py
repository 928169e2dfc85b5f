"""Scores on another split than the matrix's, to choose settings by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sdft.metrics import Cell


@dataclass
class Selection:
    """The final model on another split, to choose settings by without looking at the matrix's.

    Attributes:
        split: Which.
        cells: By the column's name; a task or suite without that split has none.
    """

    split: str
    cells: dict[str, Cell] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        cells = {name: cell.to_dict() for name, cell in self.cells.items()}
        return {"split": self.split, "cells": cells}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Selection:
        """The inverse of `to_dict`."""
        cells = {name: Cell.from_dict(cell) for name, cell in values["cells"].items()}
        return cls(values["split"], cells)
