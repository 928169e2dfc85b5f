"""What the runs of a comparison left behind, loaded and checked to belong together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sdft.comparison.folder import RunFolder, read_json
from sdft.comparison.plan import Plan, Run
from sdft.comparison.settings import Settings, run_settings
from sdft.metrics import retention_metrics


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        run: The run.
        folder: Its folder.
        retention: The content of its `retention.json`.
        cost: The content of its `cost.json`; None when there is none.
        seconds: Wall-clock time of the whole process, start and evaluation included.
    """

    run: Run
    folder: Path
    retention: dict[str, Any]
    cost: dict[str, Any] | None = None
    seconds: float | None = None

    @property
    def tasks(self) -> list[str]:
        """The tasks, in their order of training."""
        return list(self.retention["tasks"])

    @property
    def suites(self) -> list[str]:
        """The prior suites."""
        return list(self.retention["suites"])

    @property
    def columns(self) -> list[str]:
        """Tasks, then suites."""
        return [*self.tasks, *self.suites]

    @cached_property
    def scores(self) -> list[list[float | None]]:
        """The matrix `[rows][columns]`, the base row first; None where undefined."""
        return self.cells("score")

    def cells(self, key: str) -> list[list[float | None]]:
        """A value of every cell `[rows][columns]`; None where there is none."""
        return [[cell.get(key) for cell in row] for row in self.retention["matrix"]]

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """ACC, BWT, FWT, forgetting, retention per suite; see `retention_metrics`."""
        rows = [[math.nan if score is None else score for score in row] for row in self.scores]
        matrix = torch.tensor(rows, dtype=torch.float64)
        return retention_metrics(matrix, self.tasks, self.suites)

    def final(self, key: str, names: Sequence[str]) -> float | None:
        """The mean of a value over some columns of the last row; None when one is missing."""
        row = dict(zip(self.columns, self.cells(key)[-1], strict=True))
        return mean_of([row[name] for name in names])

    @property
    def selection(self) -> dict[str, float]:
        """The final model's scores on the split that chooses the learning rate, where defined."""
        cells = (self.retention.get("selection") or {}).get("cells") or {}
        scores = {name: cell.get("score") for name, cell in cells.items()}
        return {name: scores[name] for name in self.columns if scores.get(name) is not None}

    @property
    def steps(self) -> list[int] | None:
        """Optimizer steps of each stage, where the run tells."""
        return self.retention.get("stage_steps")

    def spent(self, part: str, unit: str) -> float | None:
        """What the run cost, for example `training`, `seconds`; None when it was not measured."""
        value = ((self.cost or {}).get(part) or {}).get(unit)
        return None if value is None else float(value)


@dataclass(frozen=True)
class Failure:
    """A run that did not end well: why, and the end of its log."""

    run: Run
    reason: str
    log: list[str]


@dataclass(frozen=True)
class Results:
    """All that there is of a plan.

    Attributes:
        finished: Finished runs, in the plan's order.
        failed: Failed ones.
        missing: Runs that were neither.
        changed: Runs in whose place stands one of another configuration.
    """

    finished: list[Result]
    failed: list[Failure]
    missing: list[Run]
    changed: list[Run]


def load_results(plan: Plan, settings: Mapping[str, Settings]) -> Results:
    """Read every run of the plan from its folder.

    Args:
        plan: What is compared.
        settings: Each method's configuration, by its name; a run of another one does not count.

    Raises:
        ValueError: Two runs differ in their tasks or suites, or in how many examples these have.
    """
    found = Results([], [], [], [])
    others: list[Result] = []
    for run in plan.runs:
        folder = RunFolder(plan.folder(run))
        failure, whole = folder.failure(), folder.mark() is not None and folder.shortfall() is None
        state = folder.state(run_settings(settings[run.method.name], run, folder.path))
        if state == "finished":
            found.finished.append(_result(run, folder))
        elif state == "changed":
            found.changed.append(run)
            others += [_result(run, folder)] if whole else []
        elif failure is not None:
            found.failed.append(Failure(run, failure["reason"], list(failure["log"])))
        else:
            found.missing.append(run)
    check_same_stream([*found.finished, *others])
    return found


def _result(run: Run, folder: RunFolder) -> Result:
    report, mark = read_json(folder.path / "retention.json"), folder.mark()
    assert report is not None
    assert mark is not None
    cost = read_json(folder.path / "cost.json")
    return Result(run, folder.path, report, cost, mark.get("seconds"))


def check_same_stream(results: Sequence[Result]) -> None:
    """All runs must have the same columns, each scored on as many examples.

    Raises:
        ValueError: Two have not; names both and their lists.
    """
    for kind in ("tasks", "suites"):
        for other in results[1:]:
            here, there = getattr(results[0], kind), getattr(other, kind)
            if here != there:
                raise ValueError(
                    f"the runs {results[0].folder} and {other.folder} have different {kind}: "
                    f"{here} and {there}; only runs on one stream can be compared"
                )
    for other in results[1:]:
        counts = zip(results[0].columns, results[0].cells("n")[0], other.cells("n")[0], strict=True)
        for column, mine, theirs in counts:
            if mine != theirs:
                raise ValueError(
                    f"the runs {results[0].folder} and {other.folder} score {column!r} on {mine} "
                    f"and on {theirs} examples: raise data.max_student_tokens, so that none is "
                    "dropped for its length"
                )


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean; None when there is nothing, or a value is missing."""
    defined = [value for value in values if value is not None]
    if not defined or len(defined) < len(values):
        return None
    return math.fsum(defined) / len(defined)
