"""The retention report: every evaluation of a run, and the files made of it.

It is written whole after every stage, each file atomically, so that a killed run keeps what it had.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from sdft.atomic import atomic_write
from sdft.metrics import Cell, retention_metrics
from sdft.plots import plot_curves, plot_matrix, save_figure

_CSV_CELL = ("score", "low", "high", "n", "mean_length", "truncated", "artifact")


@dataclass
class RetentionReport:
    """All cells of a run so far, with what they are cells of.

    Attributes:
        tasks: Names of the tasks, in their order of training.
        suites: Names of the prior suites.
        seed: The run's seed.
        method: What was trained with: `sdft`, `sft`, ...
        rows: Cells `[rows][columns]`: the base row, then one per finished stage; columns are the
            tasks, then the suites.
    """

    tasks: list[str]
    suites: list[str]
    seed: int | None
    method: str
    rows: list[list[Cell]] = field(default_factory=list)

    def add_row(self, cells: Sequence[Cell]) -> None:
        """Append the base row, or the row of the stage just finished.

        Raises:
            ValueError: Not one cell per column, or more stages than tasks.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"a row needs {len(self.columns)} cells, found {len(cells)}")
        if len(self.rows) > len(self.tasks):
            raise ValueError(f"all {len(self.tasks)} stages already have their row")
        self.rows.append(list(cells))

    @property
    def columns(self) -> list[str]:
        """The names of the columns: tasks, then suites."""
        return [*self.tasks, *self.suites]

    @property
    def row_labels(self) -> list[str]:
        """`base`, then the task that each stage trained."""
        return ["base", *self.tasks][: len(self.rows)]

    @property
    def matrix(self) -> Tensor:
        """The scores `[rows, columns]` in float64, NaN where undefined."""
        nan = float("nan")
        scores = [[nan if cell.score is None else cell.score for cell in row] for row in self.rows]
        shape = len(self.rows), len(self.columns)
        return torch.tensor(scores, dtype=torch.float64).reshape(shape)

    def metrics(self) -> dict[str, Any]:
        """`acc`, `bwt`, `fwt`, `forgetting`, `retention` per suite, and why some are undefined.

        See `retention_metrics` for the definitions.
        """
        return retention_metrics(self.matrix, self.tasks, self.suites)

    def to_dict(self) -> dict[str, Any]:
        """The content of `retention.json`."""
        return {
            "tasks": list(self.tasks),
            "suites": list(self.suites),
            "matrix": [[cell.to_dict() for cell in row] for row in self.rows],
            "metrics": self.metrics(),
            "seed": self.seed,
            "method": self.method,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RetentionReport:
        """The inverse of `to_dict`; the metrics are computed anew.

        Raises:
            ValueError: A row without one cell per column.
        """
        report = cls(values["tasks"], values["suites"], values["seed"], values["method"])
        for row in values["matrix"]:
            report.add_row([Cell.from_dict(cell) for cell in row])
        return report

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> RetentionReport:
        """Read the report that `write` left in a folder.

        Raises:
            FileNotFoundError: There is none.
            ValueError: `retention.json` is damaged.
        """
        file = Path(folder) / "retention.json"
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is not a retention report: {error!r}") from error

    def write(self, folder: str | PathLike[str]) -> None:
        """Write `retention.json`, `.csv` and `.png` and `curves.png`, each atomically.

        The numbers come first, so that they stand even when a plot fails.

        Args:
            folder: Made when it is missing.

        Raises:
            OSError: The folder is not writable, or the disk is full.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        with atomic_write(folder / "retention.json") as file:
            file.write_text(content + "\n", encoding="utf-8")
        with atomic_write(folder / "retention.csv") as file:
            self._write_csv(file)
        for name, plot in (("retention.png", plot_matrix), ("curves.png", plot_curves)):
            with atomic_write(folder / name) as file:
                save_figure(self._plot(plot), file)

    def _plot(self, plot: Callable[..., Figure]) -> Figure:
        return plot(self.rows, self.tasks, self.suites, self._caption())

    def _caption(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.method}{seed}\n{self._metrics_line()}"

    def _write_csv(self, path: Path) -> None:
        kinds = ["task"] * len(self.tasks) + ["suite"] * len(self.suites)
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("stage", "row", "column", "kind", *_CSV_CELL))
            for stage, (label, row) in enumerate(zip(self.row_labels, self.rows, strict=True)):
                for column, kind, cell in zip(self.columns, kinds, row, strict=True):
                    writer.writerow((stage, label, column, kind, *_csv_values(cell)))

    def summary_table(self) -> str:
        """The report as plain text: a line per task and suite, then the metrics.

        The interval and the number of examples are those of the last row.
        """
        head = ["", *(["base", *map(str, range(1, len(self.rows)))][: len(self.rows)])]
        lines = [[*head, "95 %", "n"], *map(self._summary_line, range(len(self.columns)))]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        table = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in lines
        ]
        undefined = [f"{key} undefined: {why}" for key, why in self.metrics()["undefined"].items()]
        return "\n".join([*table, self._metrics_line(), *undefined])

    def _summary_line(self, column: int) -> list[str]:
        stage = f"{column + 1}. " if column < len(self.tasks) else "suite "
        cells = [row[column] for row in self.rows]
        scores = ["n/a" if cell.score is None else f"{cell.score:.2f}" for cell in cells]
        last = cells[-1] if cells else Cell(None, 0)
        interval = "{:.2f}–{:.2f}".format(*last.ci95) if last.ci95 else ""
        return [stage + self.columns[column], *scores, interval, str(last.n)]

    def _metrics_line(self) -> str:
        metrics = self.metrics()
        acc = "n/a" if metrics["acc"] is None else f"{metrics['acc']:.2f}"
        others = [
            f"{name} {'n/a' if metrics[key] is None else format(metrics[key], '+.2f')}"
            for key, name in (("bwt", "BWT"), ("fwt", "FWT"), ("forgetting", "forgetting"))
        ]
        return "   ".join([f"ACC {acc}", *others])


def _csv_values(cell: Cell) -> tuple[float | None, ...]:
    """What `_CSV_CELL` names; an empty field is undefined."""
    low, high = cell.ci95 or (None, None)
    return cell.score, low, high, cell.n, cell.mean_length, cell.truncated, cell.artifact
