"""Measures after every stage what was learnt and what was kept."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer

from sdft.base_kl import BaseResponses
from sdft.cell_cache import CachedEvaluator
from sdft.data import ContinualDataModule
from sdft.encoded import Encoded
from sdft.evaluation import DEFAULT_ARTIFACTS, Artifacts
from sdft.evaluator import Evaluator
from sdft.flat_sharding import is_flat
from sdft.metrics import Cell
from sdft.pass_at import PassAt
from sdft.report import RetentionReport
from sdft.run import is_dry, method_label, run_folder, task_stream
from sdft.seeding import run_seed
from sdft.selector import Selector
from sdft.student import StudentModule
from sdft.suite import Suite
from sdft.tasks import Split, Task

log = logging.getLogger(__name__)


class Retention(Callback):
    """Evaluates the base, and after each stage every task and every prior suite, greedily.

    Writes `retention.json`, `.csv`, `.png` and `curves.png` into the run's folder after each row,
    and logs `retention/…`. Row s+1 belongs to the end of stage s; a row that is missing (a run
    resumed from just before the evaluation) is made up for before anything else trains.

    With `data.from_base_each_task` there is one model per task, and a row shows what a router would
    reach that never errs: the columns of the tasks learnt so far keep the score of their own model,
    all others that of the base. A method that trains nothing has the base row again.

    Args:
        split: Which examples are evaluated; a task without that split uses its validation split.
        limit: Evaluate at most this many examples per task; all when unset.
        artifact_patterns: Regular expressions that tell an artifact of the demonstration.
        artifact_opening_words: An answer carries one, too, where it begins with the same so many
            words as its example's demonstration; 0 does not compare.
        enabled: Evaluate at all.
        kl_to_base: Measure KL(base ‖ student) along the base's own greedy responses, which predicts
            forgetting (arXiv 2509.04259); needs the base (`model.track_base`).
        kl_limit: Examples per column that it is measured on, at most.
        selection_split: Evaluate the final model on this split, too, so that settings such as the
            learning rate can be chosen without looking at `split`.
        pass_at: Values of k for pass@k, estimated without bias (arXiv 2107.03374); for the base and
            after the last stage. A sample passes when its score is 1.
        pass_samples: Responses drawn per example for it; the largest k when unset.
        pass_temperature: Draws them.
        pass_limit: Examples per column that they are drawn for, at most; all when unset.
        pass_every_stage: Measure pass@k after every stage.
        cache: A folder where cells are kept by the digest of the weights and of all else that they
            depend on: what was measured before, in this or another run, is not measured again.

    Raises:
        ValueError: An unknown split, a number out of range, or a pattern that is no regular
            expression.
    """

    def __init__(
        self,
        split: Split = "test",
        limit: int | None = None,
        artifact_patterns: list[str] | None = None,
        enabled: bool = True,
        kl_to_base: bool = True,
        kl_limit: int = 64,
        selection_split: Split | None = None,
        pass_at: list[int] | None = None,
        pass_samples: int | None = None,
        pass_temperature: float = 1.0,
        pass_limit: int | None = None,
        pass_every_stage: bool = False,
        artifact_opening_words: int = 0,
        cache: str | None = None,
    ) -> None:
        _check_split("split", split)
        if selection_split is not None:
            _check_split("selection_split", selection_split)
        if limit is not None and limit < 1:
            raise ValueError(f"retention.limit must be at least 1, found {limit}")
        self.split: Split = split
        self.limit = limit
        self.enabled = enabled
        self.pass_every_stage = pass_every_stage
        ks = tuple(pass_at or ())
        samples = max(ks, default=1) if pass_samples is None else pass_samples
        passes = PassAt(ks, samples, pass_temperature, pass_limit)
        self.base = BaseResponses(kl_limit)
        measured = (
            Artifacts(artifact_patterns or DEFAULT_ARTIFACTS, artifact_opening_words),
            self.base if kl_to_base else None,
            passes if ks else None,
            limit,
        )
        self.evaluator = (
            Evaluator(*measured) if cache is None else CachedEvaluator(cache, *measured)
        )
        self.rows: list[list[Cell]] = []
        self.columns: list[str] = []
        self.steps: list[int | None] = []
        self.selector = Selector(selection_split)

    # ---------------------------------------------------------------- when

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the examples now: what cannot be read fails before anything is trained."""
        if not self.enabled:
            return
        flat = is_flat(getattr(pl_module, "model", None))
        if self.evaluator.base is not None and flat:
            raise ValueError("retention.kl_to_base must be false with FSDPStrategy")
        if isinstance(self.evaluator, CachedEvaluator) and flat:
            raise ValueError("retention.cache must be unset with FSDPStrategy")
        data = task_stream(trainer)
        for task in data.evaluated:
            if isinstance(task, Suite) and isinstance(pl_module, StudentModule):
                task.prepare(pl_module)
            elif not self._examples(data, task):
                log.warning("%r has no %s or validation examples", task.name, self.split)
        self.selector.examined(data)
        self._fit_columns([task.name for task in data.evaluated])
        # Resumed when nothing is left to train: none of the other hooks will come.
        if len(self.rows) - 1 == trainer.max_epochs:
            self._select(trainer, pl_module)
            self._report(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The base row, or the rows that a resumed run still owes."""
        self._fit_columns([task.name for task in task_stream(trainer).evaluated])
        if self.rows:
            self._report(trainer, pl_module)
        self._fill(trainer, pl_module, rows=trainer.current_epoch + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The row of the stage that has just ended."""
        self._fill(trainer, pl_module, rows=trainer.current_epoch + 2)

    def _fill(self, trainer: Trainer, pl_module: LightningModule, rows: int) -> None:
        if not self.enabled or len(self.rows) >= rows:
            return
        assert len(self.rows) == rows - 1, "one row is owed at most: stages end with theirs"
        self._add_row(trainer, pl_module)
        self._select(trainer, pl_module)
        self._report(trainer, pl_module)

    def _fit_columns(self, names: list[str]) -> None:
        """Bring a checkpoint's rows into the order of this run's columns."""
        if self.columns and self.columns != names:
            new = Cell(None, 0, error="not among the tasks and suites when this row was measured")
            found = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
            self.rows = [[row.get(name, new) for name in names] for row in found]
        self.columns = names

    # ---------------------------------------------------------------- what

    def _add_row(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, StudentModule)
        data, stage = task_stream(trainer), len(self.rows)
        changed = _changed(module, data, stage)
        if trainer.is_global_zero:
            names = ", ".join(task.name for task in changed)
            unchanged = f"{module.method} trains nothing: the base's row stands"
            print(f"evaluating {names} …" if changed else unchanged)
        ends = stage in (0, trainer.max_epochs) or data.from_base_each_task
        row = list(self.rows[-1]) if self.rows else [Cell(None, 0)] * len(data.evaluated)
        module.phases.enter("evaluate")
        with self.evaluator.same_weights(module):
            for task in changed:
                module.rest_point(True)
                row[data.evaluated.index(task)] = self.evaluator.cell(
                    module,
                    task,
                    self._examples(data, task),
                    data.eval_batch_size,
                    stage,
                    with_pass_at=ends or self.pass_every_stage,
                )
        module.phases.enter("")
        self.rows.append(row)
        self.steps.append(trainer.global_step)
        if not data.from_base_each_task:
            self.selector.cells = {}  # of an earlier student

    def _select(self, trainer: Trainer, module: LightningModule) -> None:
        """Evaluate what is due on the selection split."""
        assert isinstance(module, StudentModule)
        data = task_stream(trainer)
        due = self.selector.due(data, len(self.rows) - 1, trainer.max_epochs)
        if due:
            module.phases.enter("evaluate")
            with self.evaluator.same_weights(module):
                self.selector.update(module, data, self.evaluator, self.limit, due)
            module.phases.enter("")

    def _examples(self, data: ContinualDataModule, task: Task) -> list[Encoded]:
        found = data.encoded(task, self.split) or data.encoded(task, "validation")
        return found[: self.limit]

    # ---------------------------------------------------------------- report

    def _report(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, StudentModule)
        seconds = module.phases.lap()["evaluate"].seconds
        if not trainer.is_global_zero:
            return
        report = self._made(trainer)
        if trainer.logger is not None:
            scalars = {**_scalars(report), "seconds/evaluate": seconds}
            step = trainer.global_step if self.steps[-1] is None else self.steps[-1]
            trainer.logger.log_metrics(scalars, step=step)
        print(f"\n{report.summary_table()}\n")
        if not is_dry(trainer):
            report.write(run_folder(trainer))

    def _made(self, trainer: Trainer) -> RetentionReport:
        data = task_stream(trainer)
        ended = len(self.rows) - 1 == trainer.max_epochs
        return RetentionReport(
            tasks=[task.name for task in data.tasks],
            suites=[suite.name for suite in data.suites],
            rows=self.rows,
            seed=run_seed(),
            method=method_label(trainer),
            stage_steps=[_difference(*steps) for steps in pairwise(self.steps)],
            routed=data.from_base_each_task,
            selection=self.selector.result(data) if ended else None,
        )

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """What has been measured so far, as plain values."""
        return {
            "columns": self.columns,
            "rows": [[cell.to_dict() for cell in row] for row in self.rows],
            "steps": list(self.steps),
            "base": self.base.state_dict(),
            "selection": self.selector.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the rows of the checkpoint."""
        self.rows = [[Cell.from_dict(cell) for cell in row] for row in state_dict["rows"]]
        # What follows is missing from the checkpoints of older versions.
        self.columns = list(state_dict.get("columns", []))
        self.steps = list(state_dict.get("steps", [None] * len(self.rows)))
        for part, keeper in (("base", self.base), ("selection", self.selector)):
            if part in state_dict:
                keeper.load_state_dict(state_dict[part])


def _changed(module: StudentModule, data: ContinualDataModule, stage: int) -> list[Task]:
    """The columns whose cells may have changed since the last row."""
    if stage and not module.trains:
        return []
    return [data.tasks[stage - 1]] if stage and data.from_base_each_task else data.evaluated


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _scalars(report: RetentionReport) -> dict[str, float]:
    """The newest row and its metrics, under the names that the logger shows."""
    values: dict[str, float | None] = {}
    for name, cell in zip(report.columns, report.rows[-1], strict=True):
        values[f"retention/{name}"] = cell.score
        values[f"length/{name}"] = cell.mean_length
        values[f"artifact/{name}"] = cell.artifact
        values[f"truncated/{name}"] = cell.truncated
        values[f"thought_length/{name}"] = cell.thought_length
        values[f"unfinished/{name}"] = cell.unfinished
        values[f"kl_base/{name}"] = cell.kl_base
        values |= {f"pass_at_{k}/{name}": found.score for k, found in (cell.pass_at or {}).items()}
        values |= {f"{other}/{name}": found.score for other, found in (cell.details or {}).items()}
    for name, cell in report.selection.cells.items() if report.selection else ():
        values[f"selection/{name}"] = cell.score
    metrics = report.metrics()
    for name in ("acc", "bwt", "fwt", "forgetting"):
        values[f"retention/{name}"] = metrics[name]
    return {name: value for name, value in values.items() if value is not None}


def _check_split(key: str, split: str) -> None:
    if split not in get_args(Split):
        raise ValueError(f"retention.{key} must be one of {get_args(Split)}, found {split!r}")
