"""Evaluates the final model on the split that settings are chosen by."""

from __future__ import annotations

from typing import Any

from sdft.data import ContinualDataModule
from sdft.evaluator import Evaluator
from sdft.metrics import Cell
from sdft.selection import Selection
from sdft.student import StudentModule
from sdft.tasks import Split, Task


class Selector:
    """Knows which columns are due on the selection split, and keeps their cells.

    With one model per task each task is due with its own model, right after its stage, and the
    suites with the base. Otherwise everything is due after the last stage.

    Args:
        split: The split; nothing is ever due when None.

    Attributes:
        cells: By the column's name.
    """

    def __init__(self, split: Split | None) -> None:
        self.split = split
        self.cells: dict[str, Cell] = {}

    def examined(self, data: ContinualDataModule) -> list[Task]:
        """The tasks and suites that have examples in the split."""
        split = self.split
        return [] if split is None else [t for t in data.evaluated if data.encoded(t, split)]

    def due(self, data: ContinualDataModule, stage: int, last: int | None) -> list[Task]:
        """What is to be evaluated with the student as it is.

        Args:
            data: The task stream.
            stage: Finished stages that have their row; -1 before the base row.
            last: Stages in all.
        """
        if not data.from_base_each_task:
            now = data.evaluated if stage == last else []
        elif stage > 0:
            now = [data.tasks[stage - 1]]
        else:
            now = data.suites if stage == 0 else []
        return [t for t in self.examined(data) if t in now and t.name not in self.cells]

    def update(
        self,
        module: StudentModule,
        data: ContinualDataModule,
        evaluator: Evaluator,
        limit: int | None,
        tasks: list[Task],
    ) -> None:
        """Evaluate some of the columns.

        Args:
            module: Holds the student.
            data: The task stream.
            evaluator: Makes the cells.
            limit: Examples per column, at most.
            tasks: The columns.
        """
        assert self.split is not None
        for task in tasks:
            chosen = data.encoded(task, self.split)[:limit]
            self.cells[task.name] = evaluator.score(module, task, chosen, data.eval_batch_size)

    def result(self, data: ContinualDataModule) -> Selection | None:
        """All cells, in the order of the columns; None without a split."""
        if self.split is None:
            return None
        gone = Cell(None, 0, error="its model was gone when the split was asked for")
        names = [task.name for task in self.examined(data)]
        return Selection(self.split, {name: self.cells.get(name, gone) for name in names})

    def state_dict(self) -> dict[str, Any]:
        """The cells as plain values, and the split that they are of."""
        return {"split": self.split, "cells": {n: c.to_dict() for n, c in self.cells.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the cells of a checkpoint, if they are of the same split."""
        if state["split"] == self.split:
            self.cells = {name: Cell.from_dict(cell) for name, cell in state["cells"].items()}
