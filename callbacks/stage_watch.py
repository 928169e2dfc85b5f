"""Ends a stage early, or holds on to the old more firmly, by what small probes say on the way."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from sdft.callbacks.after_step import AfterStep
from sdft.callbacks.standing import Action, Policy, Standing
from sdft.evaluation import score_responses
from sdft.evaluator import respond_all
from sdft.ranks import agreed
from sdft.run import end_stage, is_dry, run_folder, task_stream
from sdft.student import StudentModule
from sdft.tasks import Task

log = logging.getLogger(__name__)

WEIGHT = "distil_weight"
"""The module's attribute that a drop raises."""


class StageWatch(AfterStep):
    """Probes the stage's own task and the old ones while a stage trains, and acts on both.

    Old are the tasks learnt before and the suites. A probe is greedy, on the first validation
    examples; a task or suite that has none is not watched. The first probe of a stage is made
    before anything trains, the next ones every so many optimizer steps, except where the stage ends
    anyway. Unless it acts, a probe changes nothing in what is trained. A stage that ends early is
    followed by its retention row, its checkpoint and the next stage as any other.

    Every probe is a line of `<run>/watch.jsonl`, and is logged as `watch/<column>`, with
    `watch/weight` where the method has one; every action is printed with its reason.

    Args:
        every_n_steps: Optimizer steps between two probes of a stage; 0 watches nothing.
        limit: Validation examples per task or suite and probe.
        patience: End the stage after so many probes in a row that did not improve its own task;
            null never ends it for that.
        min_delta: An improvement is a score that beats the stage's start, or the improvement before
            it, by more than this.
        max_drop: An old task or suite has dropped when its score is more than this below its best
            at the start of a stage, where the first stage starts with the base. A drop that lasts
            beyond its stage is one in the next stages, too.
        on_drop: What a drop is answered with. `raise_weight` raises the method's `distil_weight`,
            once per probe, up to `max_weight`, for the rest of the run; `stop` ends the stage;
            `both` raises it, and ends the stage at a drop that finds it at `max_weight` already;
            `ignore` does nothing. When unset, `raise_weight` for a method that has the weight, and
            `stop` for any other.
        raise_by: How much the weight is raised at a time.
        max_weight: The weight is never raised above this.

    Raises:
        ValueError: A number out of range or an unknown `on_drop`. As `fit` starts: a method without
            the weight that `on_drop` raises, or no validation examples at all.
    """

    def __init__(
        self,
        every_n_steps: int = 0,
        limit: int = 32,
        patience: int | None = 3,
        min_delta: float = 0.0,
        max_drop: float = 0.05,
        on_drop: Literal["raise_weight", "stop", "both", "ignore"] | None = None,
        raise_by: float = 0.1,
        max_weight: float = 0.8,
    ) -> None:
        if every_n_steps < 0:
            raise ValueError(f"watch.every_n_steps must be 0 or more, found {every_n_steps}")
        if limit < 1:
            raise ValueError(f"watch.limit must be at least 1, found {limit}")
        self.every_n_steps = every_n_steps
        self.limit = limit
        self.by_method = on_drop is None
        answer = on_drop or "stop"
        self.policy = Policy(patience, min_delta, max_drop, answer, raise_by, max_weight)
        self.standing = Standing()

    # ---------------------------------------------------------------- when

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what cannot be watched, before anything is trained."""
        if self.every_n_steps == 0:
            return
        if self.by_method and _weight(pl_module) is not None:
            self.policy = replace(self.policy, on_drop="raise_weight")
        if self.policy.raises and _weight(pl_module) is None:
            raise ValueError(
                f"watch.on_drop {self.policy.on_drop!r} raises the method's {WEIGHT}, which the "
                f"method {getattr(pl_module, 'method', type(pl_module).__name__)!r} does not have: "
                "set watch.on_drop to stop or ignore"
            )
        data = task_stream(trainer)
        silent = [task.name for task in data.evaluated if not data.encoded(task, "validation")]
        if len(silent) == len(data.evaluated):
            raise ValueError(
                f"watch.every_n_steps is {self.every_n_steps}, but no task or suite has validation "
                "examples: give them some, or set it to 0"
            )
        if silent:
            log.warning("without validation examples, hence not watched: %s", ", ".join(silent))
        if not _old(trainer, len(data.tasks) - 1):
            log.warning("no old task or suite can be watched in any stage: no drop will be seen")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The probe that a stage starts with, which drops and improvements are measured by."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.every_n_steps == 0 or batch_idx > 0:
            return
        stage = trainer.current_epoch
        self.standing.begin(stage)
        if task_stream(trainer).from_base_each_task:
            return  # the student becomes the base after this hook
        assert isinstance(pl_module, StudentModule)
        own, scores = self._probe(trainer, pl_module)
        self.standing.refer(scores)
        if own in scores:
            self.standing.learn(scores[own], self.policy.min_delta)
        if trainer.is_global_zero:
            found = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
            none = "" if _old(trainer, stage) else "; no old task or suite to watch"
            print(f"watch: stage {stage + 1} starts at {found or 'no score'}{none}")
        self._record(trainer, pl_module, scores, [], start=True)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Probe every so many optimizer steps of the stage, except where it ends anyway."""
        if self.every_n_steps == 0 or trainer.is_last_batch:
            return
        step = (trainer.fit_loop.batch_idx + 1) // trainer.accumulate_grad_batches
        if step % self.every_n_steps != 0:
            return
        assert isinstance(pl_module, StudentModule)
        if self.standing.stage != trainer.current_epoch:  # resumed from a run that did not watch
            self.standing.begin(trainer.current_epoch)
        own, scores = self._probe(trainer, pl_module)
        actions = self.policy.judge(self.standing, own, scores, _weight(pl_module))
        for action in actions:
            if trainer.is_global_zero:
                print(f"watch: step {trainer.global_step}: {action}")
            if action.action == "raise_weight":
                setattr(pl_module, WEIGHT, action.weight)
        if any(action.action == "stop" for action in actions):
            end_stage(trainer)
        self._record(trainer, pl_module, scores, actions)

    # ---------------------------------------------------------------- what

    def _probe(self, trainer: Trainer, module: StudentModule) -> tuple[str, dict[str, float]]:
        """The name of the stage's own task, and the scores of what is watched in the stage."""
        stage = trainer.current_epoch
        own = task_stream(trainer).tasks[stage]
        phase = module.phases.current
        module.phases.enter("evaluate")
        # Looking must not change what is trained, whatever an engine or a scorer draws.
        with torch.random.fork_rng():
            columns = [own, *_old(trainer, stage)]
            found = agreed({task.name: self._score(trainer, module, task) for task in columns})
        module.phases.enter(phase)
        return own.name, {name: score for name, score in found.items() if score is not None}

    def _score(self, trainer: Trainer, module: StudentModule, task: Task) -> float | None:
        data = task_stream(trainer)
        encoded = data.encoded(task, "validation")[: self.limit]
        if not encoded:
            return None
        responses = respond_all(module, encoded, data.eval_batch_size)
        try:
            scores = score_responses(task, [item.example for item in encoded], responses)
        except ValueError as error:  # costs this score alone, as in the retention matrix
            log.warning("%s", error)
            return None
        return sum(scores) / len(scores)

    def _record(
        self,
        trainer: Trainer,
        module: StudentModule,
        scores: Mapping[str, float],
        actions: list[Action],
        start: bool = False,
    ) -> None:
        if not trainer.is_global_zero:
            return
        weight = _weight(module)
        if trainer.logger is not None:
            values = {f"watch/{name}": score for name, score in scores.items()}
            values |= {} if weight is None else {"watch/weight": weight}
            trainer.logger.log_metrics(values, step=trainer.global_step)
        if is_dry(trainer):
            return
        record = {
            "step": trainer.global_step,
            "task": task_stream(trainer).tasks[trainer.current_epoch].name,
            "start": start,
            "scores": scores,
            "weight": weight,
            "actions": [asdict(action) for action in actions],
            **asdict(self.standing),
        }
        path = run_folder(trainer) / "watch.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """What the probes have found so far, as plain values."""
        return asdict(self.standing)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with what the checkpoint's run had found."""
        self.standing = Standing(**state_dict)


def _old(trainer: Trainer, stage: int) -> list[Task]:
    """What a stage may harm, and can be watched."""
    data = task_stream(trainer)
    if data.from_base_each_task:  # every task has a model of its own
        return []
    found = [*data.tasks[:stage], *data.suites]
    return [task for task in found if data.encoded(task, "validation")]


def _weight(module: LightningModule) -> float | None:
    value = getattr(module, WEIGHT, None)
    return None if value is None else float(value)
