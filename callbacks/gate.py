"""Lets a stage pass only if it has not cost too much of what was known before."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from sdft.callbacks.after_step import AfterStep
from sdft.callbacks.checkpoint import StageCheckpoint
from sdft.callbacks.retention import Retention
from sdft.checkpoints import FOLDER
from sdft.gate.drop import Drop, best_cells, find_drops, references_of
from sdft.gate.ledger import Decision, Entry
from sdft.gate.more_replay import MoreReplay
from sdft.gate.rollback import go_back, stage_checkpoint
from sdft.gate.settings import OnDrop, check_counts, check_drops, check_retry
from sdft.gate.stop import GateRetry, GateStop, advice
from sdft.gate.version import Version
from sdft.guard.rates import scale_rates
from sdft.metrics import Cell
from sdft.ranks import agreed, ranks
from sdft.run import is_dry, run_folder, task_stream
from sdft.student import StudentModule


class Gate(AfterStep):
    """Judges each stage by what it has cost of the tasks learnt before and of the suites.

    After a stage's row of the retention matrix, each protected column is held to its best score so
    far: a suite to the base's and that of any accepted stage, a task to those since it was learnt.
    A column fell when it lies more than its allowed drop below, and that is more than chance. With
    `every_n_steps`, a small probe looks in the middle of a stage, too.

    A stage without a fall is accepted. Otherwise: `rollback` ends the run; its last checkpoint is
    that of the last accepted stage. `retry` trains the stage again from there, with a lower
    learning rate or more replay, and after `retries` times does the same; in one process, by the
    command line. `continue` notes it and goes on. Checkpoints of a rejected stage get names that
    begin with `withdrawn-`: none is deleted. Every decision is a line of `<run>/history.jsonl`;
    `python -m sdft history` shows them.

    Args:
        on_drop: What a fall is answered with; unset, no stage is judged.
        max_drop: How far a protected column may fall.
        protect: The columns, with how far each may fall; all old tasks and suites when unset.
        certain: Count a fall only if the 95 % interval of the difference is above 0, too.
        every_n_steps: Optimizer steps of a stage between two probes; 0 probes nothing.
        probe_limit: Examples per column and probe.
        retries: How often a stage is tried again.
        retry_lr_factor: What the learning rate of the stage is multiplied by, per failed attempt.
        retry_replay: Examples of earlier tasks that are replayed per new one in the stage, for each
            failed attempt.
        attempts: Failed attempts by stage, from 0; set by a retry.

    Raises:
        ValueError: A number out of range; as `fit` starts: an unknown column, no retention matrix,
            no checkpoints of stages, or a method that cannot learn from replayed examples.
    """

    def __init__(
        self,
        on_drop: OnDrop | None = None,
        max_drop: float = 0.05,
        protect: dict[str, float] | None = None,
        certain: bool = True,
        every_n_steps: int = 0,
        probe_limit: int = 32,
        retries: int = 1,
        retry_lr_factor: float = 0.5,
        retry_replay: float = 0.0,
        attempts: dict[int, int] | None = None,
    ) -> None:
        check_drops(on_drop, max_drop, protect or {})
        check_counts(every_n_steps, probe_limit, retries)
        check_retry(on_drop, retry_lr_factor, retry_replay)
        self.on_drop = on_drop
        self.max_drop, self.protect, self.certain = max_drop, protect, certain
        self.every_n_steps, self.probe_limit = every_n_steps, probe_limit
        self.retries, self.lr_factor, self.replay = retries, retry_lr_factor, retry_replay
        self.attempts = {int(stage): int(n) for stage, n in (attempts or {}).items()}
        self.judged = 0
        self.good: str | None = None
        self.scaled = 1.0
        self.probes: dict[str, Cell] = {}

    # ---------------------------------------------------------------- when

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what cannot be judged, before anything is trained."""
        if self.on_drop is None:
            return
        assert isinstance(pl_module, StudentModule)
        data, callbacks = task_stream(trainer), trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(c, Retention) and c.enabled for c in callbacks):
            raise ValueError("gate.on_drop needs the retention matrix: set retention.enabled")
        if self.on_drop != "continue" and not any(
            isinstance(c, StageCheckpoint) and c.stages for c in callbacks
        ):
            raise ValueError("gate.on_drop needs checkpoints of stages: set checkpoint.stages")
        names = [task.name for task in data.evaluated]
        for name in self.protect or ():
            if name not in names:
                raise ValueError(
                    f"gate.protect names {name!r}, which is no task or suite; there are: "
                    f"{', '.join(map(repr, names))}"
                )
        if self.on_drop == "retry" and self.replay:
            if "past" not in pl_module.learns_from:
                raise ValueError(
                    f"gate.retry_replay: the method {pl_module.method!r} cannot learn from "
                    "replayed examples: set gate.retry_lr_factor alone"
                )
            data.mixtures.append(MoreReplay(self.replay, self.attempts))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Judge the stage before this one, and begin this one."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.on_drop is None:
            return
        self._judge_stages(trainer)
        if batch_idx == 0:
            self._begin(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last stage."""
        if self.on_drop is not None:
            self._judge_stages(trainer)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Probe in the middle of a stage."""
        if self.on_drop is None or self.every_n_steps == 0 or trainer.is_last_batch:
            return
        step = (trainer.fit_loop.batch_idx + 1) // trainer.accumulate_grad_batches
        if step % self.every_n_steps:
            return
        stage = trainer.current_epoch
        cells = self._probe(trainer, pl_module, stage)
        drops = find_drops(self.probes, cells, self._allowed(trainer, stage), self.certain)
        if drops:
            self._fell(trainer, stage, cells, drops, checkpoint=None)

    # ---------------------------------------------------------------- judging

    def _judge_stages(self, trainer: Trainer) -> None:
        (retention,) = [c for c in trainer.callbacks if isinstance(c, Retention)]  # type: ignore[attr-defined]
        while self.judged < len(retention.rows) - 1:
            self._judge(trainer, self.judged, retention.rows)

    def _judge(self, trainer: Trainer, stage: int, rows: list[list[Cell]]) -> None:
        self.judged = stage + 1
        data = task_stream(trainer)
        names = [task.name for task in data.evaluated]
        table = [dict(zip(names, row, strict=True)) for row in rows]
        references = references_of(data.tasks, table[: stage + 1])
        cells = table[stage + 1]
        drops = find_drops(references, cells, self._allowed(trainer, stage), self.certain)
        checkpoint = stage_checkpoint(self._folders(trainer), stage)
        if drops:
            self._fell(trainer, stage, cells, drops, checkpoint)
        else:
            self._note(trainer, "accepted", stage, cells, [], checkpoint)
        self.good = None if checkpoint is None else str(checkpoint)

    def _folders(self, trainer: Trainer) -> list[Path]:
        """Where checkpoints of this run stand: its own, and what it was resumed from."""
        own = run_folder(trainer) / FOLDER
        return [own] if trainer.ckpt_path is None else [own, Path(trainer.ckpt_path).parent]

    def _allowed(self, trainer: Trainer, stage: int) -> dict[str, float]:
        """How far each old column may fall in a stage."""
        data = task_stream(trainer)
        old = [task.name for task in [*data.tasks[:stage], *data.suites]]
        if self.protect is None:
            return dict.fromkeys(old, self.max_drop)
        return {name: most for name, most in self.protect.items() if name in old}

    def _fell(
        self,
        trainer: Trainer,
        stage: int,
        cells: Mapping[str, Cell],
        drops: list[Drop],
        checkpoint: Path | None,
    ) -> None:
        """Do what the configuration says."""
        reasons = [str(drop) for drop in drops]
        if self.on_drop == "continue":
            self._note(trainer, "tolerated", stage, cells, reasons, checkpoint)
            return
        good = None if self.good is None else Path(self.good)
        self._note(trainer, "rejected", stage, cells, reasons, checkpoint, good)
        if trainer.is_global_zero and not is_dry(trainer):
            go_back(run_folder(trainer) / FOLDER, good)
        trainer.strategy.barrier("Gate")
        task = task_stream(trainer).tasks[stage].name
        told = f"gate: stage {stage + 1} ({task}) is rejected: {'; '.join(reasons)}"
        failed = self.attempts.get(stage, 0)
        if self.on_drop == "retry" and failed < self.retries and ranks() == 1:
            raise GateRetry(told, good, {**self.attempts, stage: failed + 1})
        raise GateStop(f"{told}. {advice(good)}")

    def _note(
        self,
        trainer: Trainer,
        decision: Decision,
        stage: int,
        cells: Mapping[str, Cell],
        reasons: list[str],
        checkpoint: Path | None,
        follows: Path | None = None,
    ) -> None:
        """Write the decision down, and say it."""
        if not trainer.is_global_zero or is_dry(trainer):
            return
        version = None if checkpoint is None else Version.of(checkpoint)
        task = task_stream(trainer).tasks[stage].name
        name = f"stage-{stage + 1}-{task}" if version is None else version.name
        attempt = self.attempts.get(stage, 0) + 1
        scores = {column: cell.score for column, cell in cells.items()}
        Entry(
            decision,
            name,
            stage + 1,
            task,
            attempt,
            trainer.global_step,
            scores,
            reasons,
            None if follows is None else str(follows),
            time.time(),
        ).append_to(run_folder(trainer))
        print(f"gate: {decision} {name}" + "".join(f"\n  {reason}" for reason in reasons))

    # ---------------------------------------------------------------- a stage

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Take the stage's learning rate, and the probe that it is held to."""
        stage = trainer.current_epoch
        wanted = self.lr_factor ** self.attempts.get(stage, 0)
        if wanted != self.scaled:
            schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
            for optimizer in trainer.optimizers:
                scale_rates(optimizer, schedules, wanted / self.scaled)
            self.scaled = wanted
        if self.every_n_steps and not task_stream(trainer).from_base_each_task:
            found = self._probe(trainer, module, stage)
            self.probes = best_cells([self.probes, found])

    def _probe(self, trainer: Trainer, module: LightningModule, stage: int) -> dict[str, Cell]:
        """The protected columns' scores on a few examples."""
        assert isinstance(module, StudentModule)
        (retention,) = [c for c in trainer.callbacks if isinstance(c, Retention)]  # type: ignore[attr-defined]
        data, allowed = task_stream(trainer), self._allowed(trainer, stage)
        before = module.phases.current
        module.phases.enter("evaluate")
        cells = {}
        for task in data.evaluated:
            if task.name in allowed:
                found = data.encoded(task, "validation") or data.encoded(task, retention.split)
                cells[task.name] = retention.evaluator.score(
                    module, task, found[: self.probe_limit], data.eval_batch_size
                )
        module.phases.enter(before)
        return agreed(cells)

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """What was decided so far, as plain values."""
        return {
            "judged": self.judged,
            "good": self.good,
            "scaled": self.scaled,
            "attempts": dict(self.attempts),
            "probes": {name: cell.to_dict() for name, cell in self.probes.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on; attempts that the command line knows of are not forgotten."""
        self.judged = state_dict["judged"]
        self.good = state_dict["good"]
        self.scaled = state_dict["scaled"]
        for stage, failed in state_dict["attempts"].items():
            self.attempts[int(stage)] = max(failed, self.attempts.get(int(stage), 0))
        self.probes = {k: Cell.from_dict(v) for k, v in state_dict["probes"].items()}
