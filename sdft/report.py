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
from sdft.selection import Selection

_CSV_CELL = ("score", "low", "high", "n", "mean_length", "truncated", "artifact", "kl_base")
_THOUGHTS = ("thought_length", "unfinished")


ROUTED = "routed: one model per task"


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
        stage_steps: Optimizer steps that each finished stage took; None where unknown.
        routed: Whether every task has a model of its own, learnt from the base, and its column
            shows that model's score: what a router would reach that never errs.
        selection: The final model on the split that settings are chosen by, if there is one.
    """

    tasks: list[str]
    suites: list[str]
    seed: int | None
    method: str
    rows: list[list[Cell]] = field(default_factory=list)
    stage_steps: list[int | None] = field(default_factory=list)
    routed: bool = False
    selection: Selection | None = None

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
    def pass_ks(self) -> list[int]:
        """The k of every pass@k that was measured, in order."""
        return sorted({int(k) for row in self.rows for cell in row for k in cell.pass_at or {}})

    @property
    def thoughts(self) -> tuple[str, ...]:
        """What is known of thoughts; empty where no cell knows anything."""
        found = any(cell.thought_length is not None for row in self.rows for cell in row)
        return _THOUGHTS if found else ()

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
            "stage_steps": list(self.stage_steps),
            "routed": self.routed,
            "selection": None if self.selection is None else self.selection.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RetentionReport:
        """The inverse of `to_dict`; the metrics are computed anew.

        Reports that older versions wrote lack what was not yet measured.

        Raises:
            ValueError: A row without one cell per column.
        """
        report = cls(values["tasks"], values["suites"], values["seed"], values["method"])
        report.stage_steps = list(values.get("stage_steps", []))
        report.routed = values.get("routed", False)
        if values.get("selection") is not None:
            report.selection = Selection.from_dict(values["selection"])
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
        routed = f"\n{ROUTED}" if self.routed else ""
        return f"{self.method}{seed}\n{self._metrics_line()}{routed}"

    def _write_csv(self, path: Path) -> None:
        kinds = ["task"] * len(self.tasks) + ["suite"] * len(self.suites)
        ks = self.pass_ks
        passes = [f"pass@{k}{end}" for k in ks for end in ("", "_low", "_high")]
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("stage", "row", "column", "kind", *_CSV_CELL, *self.thoughts, *passes))
            for stage, (label, row) in enumerate(zip(self.row_labels, self.rows, strict=True)):
                for column, kind, cell in zip(self.columns, kinds, row, strict=True):
                    thoughts = (getattr(cell, key) for key in self.thoughts)
                    values = *_csv_values(cell), *thoughts, *_csv_passes(cell, ks)
                    writer.writerow((stage, label, column, kind, *values))

    def summary_table(self) -> str:
        """The report as plain text: a line per task and suite, then the metrics.

        The interval, the number of examples, KL and pass@k are those of the last row.
        """
        head = ["", *(["base", *map(str, range(1, len(self.rows)))][: len(self.rows)])]
        lines = [[*head, "95 %", "n"], *map(self._summary_line, range(len(self.columns)))]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        table = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in lines
        ]
        undefined = [f"{key} undefined: {why}" for key, why in self.metrics()["undefined"].items()]
        return "\n".join([*table, self._metrics_line(), *self._other_lines(), *undefined])

    def _other_lines(self) -> list[str]:
        """What there is beside the matrix: a line each."""
        last = dict(zip(self.columns, self.rows[-1], strict=True)) if self.rows else {}
        kl = {name: f"{c.kl_base:.2g}" for name, c in last.items() if c.kl_base is not None}
        passes = {name: _shown_passes(c) for name, c in last.items() if c.pass_at is not None}
        lines = {
            "artifacts, first row → last": self._artifacts(),
            "tokens of thoughts, first row → last": self._thought_lengths(),
            "thoughts without an end": {
                n: _shown(c.unfinished) for n, c in last.items() if c.unfinished
            },
            "KL(base ‖ student)": kl,
            f"pass@{'/'.join(map(str, self.pass_ks))}": passes,
            "other scores": {n: _shown_details(c) for n, c in last.items() if c.details},
        }
        if self.selection is not None:
            cells = self.selection.cells.items()
            lines[f"{self.selection.split} split"] = {name: _shown(c.score) for name, c in cells}
        return [
            *([ROUTED] if self.routed else []),
            *(
                f"{head}: " + ", ".join(f"{name} {value}" for name, value in values.items())
                for head, values in lines.items()
                if values
            ),
        ]

    def _artifacts(self) -> dict[str, str]:
        """Shares of responses that carry an artifact, of the columns where any row has some."""
        found = {}
        for name, cells in zip(self.columns, zip(*self.rows, strict=True), strict=False):
            if any(cell.artifact for cell in cells):
                found[name] = " → ".join(_shown(cell.artifact) for cell in (cells[0], cells[-1]))
        return found

    def _thought_lengths(self) -> dict[str, str]:
        found = {}
        for name, cells in zip(self.columns, zip(*self.rows, strict=True), strict=False):
            if any(cell.thought_length for cell in cells):
                ends = (cells[0].thought_length, cells[-1].thought_length)
                found[name] = " → ".join("n/a" if v is None else f"{v:.0f}" for v in ends)
        return found

    def _summary_line(self, column: int) -> list[str]:
        stage = f"{column + 1}. " if column < len(self.tasks) else "suite "
        cells = [row[column] for row in self.rows]
        scores = [_shown(cell.score) for cell in cells]
        last = cells[-1] if cells else Cell(None, 0)
        interval = "{:.2f}–{:.2f}".format(*last.ci95) if last.ci95 else ""
        return [stage + self.columns[column], *scores, interval, str(last.n)]

    def _metrics_line(self) -> str:
        metrics = self.metrics()
        others = [
            f"{name} {'n/a' if metrics[key] is None else format(metrics[key], '+.2f')}"
            for key, name in (("bwt", "BWT"), ("fwt", "FWT"), ("forgetting", "forgetting"))
        ]
        return "   ".join([f"ACC {_shown(metrics['acc'])}", *others])


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def _shown_passes(cell: Cell) -> str:
    estimates = sorted((int(k), estimate) for k, estimate in (cell.pass_at or {}).items())
    return "/".join(f"{estimate.score:.2f}" for _, estimate in estimates)


def _shown_details(cell: Cell) -> str:
    return " ".join(f"{name} {found.score:.2f}" for name, found in (cell.details or {}).items())


def _csv_values(cell: Cell) -> tuple[float | None, ...]:
    """What `_CSV_CELL` names; an empty field is undefined."""
    low, high = cell.ci95 or (None, None)
    manner = cell.mean_length, cell.truncated, cell.artifact
    return cell.score, low, high, cell.n, *manner, cell.kl_base


def _csv_passes(cell: Cell, ks: Sequence[int]) -> list[float | None]:
    """Score, low and high of each pass@k; empty fields where it was not measured."""
    values: list[float | None] = []
    for k in ks:
        found = (cell.pass_at or {}).get(str(k))
        values += [found.score, *found.ci95] if found else [None] * 3
    return values
