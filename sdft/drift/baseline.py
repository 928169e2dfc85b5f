"""What a model did when it was let out: a row of a run's retention report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sdft.metrics import Cell
from sdft.report import RetentionReport

LAST = "last"


@dataclass(frozen=True)
class Baseline:
    """The cells that a model is held to.

    Attributes:
        path: The report.
        row: `base`, or the task whose stage ended with these cells.
        cells: By column, the tasks first.
        suites: Which of the columns are suites.
    """

    path: Path
    row: str
    cells: dict[str, Cell]
    suites: frozenset[str]

    @classmethod
    def read(cls, path: Path, row: str = LAST) -> Baseline:
        """Read one row of a report.

        Args:
            path: A `retention.json`, or the folder that has one.
            row: `last`, `base`, or a task: the row at the end of its stage.

        Raises:
            ValueError: No report, a damaged one, or one without the row.
        """
        file = path / "retention.json" if path.is_dir() else path
        report = _load(file)
        labels = report.row_labels
        if not labels:
            raise ValueError(f"--baseline {str(file)!r} has no row: nothing was measured yet")
        if row != LAST and row not in labels:
            raise ValueError(f"--row {row!r}: {file} has {LAST}, {', '.join(labels)}")
        place = len(labels) - 1 if row == LAST else labels.index(row)
        cells = dict(zip(report.columns, report.rows[place], strict=True))
        return cls(file, labels[place], cells, frozenset(report.suites))

    def chosen(self, names: list[str] | None) -> list[str]:
        """The columns to look at: those named, or all.

        Raises:
            ValueError: A name that is no column.
        """
        for name in names or ():
            if name not in self.cells:
                raise ValueError(
                    f"--columns {name!r}: {self.path} has {', '.join(map(repr, self.cells))}"
                )
        return [name for name in self.cells if not names or name in names]


def _load(file: Path) -> RetentionReport:
    try:
        return RetentionReport.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(
            f"--baseline {str(file)!r} cannot be read: {error.strerror or error}; give a run's "
            "retention.json or its folder"
        ) from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--baseline {str(file)!r} is not a retention report: {error!r}"
        ) from error
