"""Measures after every stage what was learnt and what was kept."""

from __future__ import annotations

import logging
from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer

from sdft.encoded import Encoded
from sdft.evaluation import DEFAULT_ARTIFACTS, Artifacts, Response, summarise
from sdft.metrics import Cell
from sdft.report import RetentionReport
from sdft.run import is_dry, method_label, run_folder, task_stream
from sdft.seeding import run_seed
from sdft.student import StudentModule
from sdft.tasks import Split, Task

log = logging.getLogger(__name__)


class Retention(Callback):
    """Evaluates the base, and after each stage every task and every prior suite, greedily.

    Writes `retention.json`, `.csv`, `.png` and `curves.png` into the run's folder after each row,
    and logs `retention/…`. Row s+1 belongs to the end of stage s; a row that is missing (a run
    resumed from just before the evaluation) is made up for before anything else trains.

    Args:
        split: Which examples are evaluated; a task without that split uses its validation split.
        limit: Evaluate at most this many examples per task; all when unset.
        artifact_patterns: Regular expressions that tell an artifact of the demonstration.
        enabled: Evaluate at all.

    Raises:
        ValueError: An unknown split, a limit below 1, or a pattern that is no regular expression.
    """

    def __init__(
        self,
        split: Split = "test",
        limit: int | None = None,
        artifact_patterns: list[str] | None = None,
        enabled: bool = True,
    ) -> None:
        if split not in get_args(Split):
            raise ValueError(f"retention.split must be one of {get_args(Split)}, found {split!r}")
        if limit is not None and limit < 1:
            raise ValueError(f"retention.limit must be at least 1, found {limit}")
        self.split: Split = split
        self.limit = limit
        self.artifacts = Artifacts(artifact_patterns or DEFAULT_ARTIFACTS)
        self.enabled = enabled
        self.rows: list[list[Cell]] = []

    # ---------------------------------------------------------------- when

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the examples now: what cannot be read fails before anything is trained."""
        if self.enabled:
            for task in task_stream(trainer).evaluated:
                if not self._examples(trainer, task):
                    log.warning("%r has no %s or validation examples", task.name, self.split)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The base row, or the rows that a resumed run still owes."""
        if self.rows:
            self._report(trainer, pl_module, seconds=0.0)
        self._fill(trainer, pl_module, rows=trainer.current_epoch + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The row of the stage that has just ended."""
        self._fill(trainer, pl_module, rows=trainer.current_epoch + 2)

    def _fill(self, trainer: Trainer, pl_module: LightningModule, rows: int) -> None:
        if not self.enabled or len(self.rows) >= rows:
            return
        assert isinstance(pl_module, StudentModule)
        assert len(self.rows) == rows - 1, "one row is owed at most: stages end with theirs"
        clock = pl_module.phases
        clock.enter("evaluate")
        evaluated = task_stream(trainer).evaluated
        if trainer.is_global_zero:
            print(f"evaluating {', '.join(task.name for task in evaluated)} …")
        self.rows.append([self._cell(trainer, pl_module, task) for task in evaluated])
        clock.enter("")
        self._report(trainer, pl_module, seconds=clock.lap()["evaluate"])

    # ---------------------------------------------------------------- what

    def _cell(self, trainer: Trainer, module: StudentModule, task: Task) -> Cell:
        encoded = self._examples(trainer, task)
        responses = respond_all(module, encoded, task_stream(trainer).eval_batch_size)
        return summarise(task, [item.example for item in encoded], responses, self.artifacts)

    def _examples(self, trainer: Trainer, task: Task) -> list[Encoded]:
        data = task_stream(trainer)
        found = data.encoded(task, self.split) or data.encoded(task, "validation")
        return found[: self.limit]

    def _report(self, trainer: Trainer, module: LightningModule, seconds: float) -> None:
        data = task_stream(trainer)
        report = RetentionReport(
            tasks=[task.name for task in data.tasks],
            suites=[suite.name for suite in data.suites],
            rows=self.rows,
            seed=run_seed(),
            method=method_label(trainer),
        )
        if not trainer.is_global_zero:
            return
        if trainer.logger is not None:
            scalars = {**_scalars(report), "seconds/evaluate": seconds}
            trainer.logger.log_metrics(scalars, step=trainer.global_step)
        print(f"\n{report.summary_table()}\n")
        if not is_dry(trainer):
            report.write(run_folder(trainer))

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, as plain values."""
        return {"rows": [[cell.to_dict() for cell in row] for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the rows of the checkpoint."""
        self.rows = [[Cell.from_dict(cell) for cell in row] for row in state_dict["rows"]]


def respond_all(module: StudentModule, encoded: list[Encoded], batch_size: int) -> list[Response]:
    """Greedy responses to all examples, in their order; batched by length to save padding."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].student_ids))
    responses: list[Response | None] = [None] * len(encoded)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        prompts = [encoded[i].student_ids for i in chosen]
        for i, response in zip(chosen, module.respond(prompts, module.greedy), strict=True):
            responses[i] = response
    return [response for response in responses if response is not None]


def _scalars(report: RetentionReport) -> dict[str, float]:
    """The newest row and its metrics, under the names that the logger shows."""
    names = [*report.tasks, *report.suites]
    values: dict[str, float | None] = {}
    for name, cell in zip(names, report.rows[-1], strict=True):
        values[f"retention/{name}"] = cell.score
        values[f"length/{name}"] = cell.mean_length
        values[f"artifact/{name}"] = cell.artifact
        values[f"truncated/{name}"] = cell.truncated
    metrics = report.to_dict()["metrics"]
    for name in ("acc", "bwt", "fwt", "forgetting"):
        values[f"retention/{name}"] = metrics[name]
    return {name: value for name, value in values.items() if value is not None}
