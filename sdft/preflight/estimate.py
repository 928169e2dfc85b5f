"""What the run will take: time and tokens by the timed steps, memory by the calculator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdft.methods import TeacherSampleModule
from sdft.methods.offline import OfflineModule
from sdft.preflight.configured import Configured
from sdft.preflight.facts import TaskFacts
from sdft.preflight.footprint import Footprint
from sdft.preflight.trial import Trial
from sdft.suite import Suite


@dataclass(frozen=True)
class TaskEstimate:
    """One stage.

    Attributes:
        batches: Of the stage.
        trial: A timed batch of it.
    """

    batches: int
    trial: Trial

    @property
    def seconds(self) -> float | None:
        """Of all batches; None where none was timed."""
        return None if self.trial.seconds is None else self.batches * self.trial.seconds

    @property
    def tokens(self) -> dict[str, float]:
        """Tokens through a model by phase, in all batches."""
        return {name: self.batches * count for name, count in self.trial.tokens.items()}


@dataclass(frozen=True)
class RunEstimate:
    """The whole run.

    Attributes:
        tasks: By name; a task without examples that fit has no part in it.
        prepare_seconds: For answers made before the first step.
        evaluation_seconds: For the rows of the retention matrix; None where it cannot be told.
        evaluated: Answers that these rows take.
        footprint: Memory.
        device: Where the steps were timed.
        notes: What the figures leave out or assume.
    """

    tasks: dict[str, TaskEstimate]
    prepare_seconds: float
    evaluation_seconds: float | None
    evaluated: int
    footprint: Footprint
    device: str
    notes: list[str] = field(default_factory=list)

    @property
    def training_seconds(self) -> float | None:
        """Of all stages; None where one of them was not timed."""
        parts = [task.seconds for task in self.tasks.values()]
        if not parts or None in parts:
            return None
        return self.prepare_seconds + sum(part for part in parts if part is not None)

    @property
    def seconds(self) -> float | None:
        """Training and evaluation."""
        if self.training_seconds is None or self.evaluation_seconds is None:
            return None
        return self.training_seconds + self.evaluation_seconds

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens through a model by phase of training; a token counts once for every pass."""
        found: dict[str, float] = {}
        for task in self.tasks.values():
            for name, count in task.tokens.items():
                found[name] = found.get(name, 0) + count
        return {name: round(count) for name, count in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "time": {
                "seconds": self.seconds,
                "training_seconds": self.training_seconds,
                "evaluation_seconds": self.evaluation_seconds,
                "prepare_seconds": self.prepare_seconds,
                "evaluated_answers": self.evaluated,
                "tasks": {name: _task_dict(task) for name, task in self.tasks.items()},
                "device": self.device,
            },
            "tokens": {"total": sum(self.tokens.values()) or None, **self.tokens},
            "memory": self.footprint.to_dict(),
            "notes": self.notes,
        }


def _task_dict(task: TaskEstimate) -> dict[str, Any]:
    return {
        "batches": task.batches,
        "seconds": task.seconds,
        "seconds_per_batch": task.trial.seconds,
        "seconds_per_batch_by_phase": task.trial.phases,
        "timed_batches": task.trial.steps,
        "problem": task.trial.problem or None,
    }


def estimate(
    configured: Configured,
    facts: Sequence[TaskFacts],
    trials: Mapping[str, Trial],
    footprint: Footprint,
    device: str,
) -> RunEstimate:
    """Reckon the run from timed batches.

    Args:
        configured: The run.
        facts: Of its tasks.
        trials: Timed batches by task.
        footprint: Its memory.
        device: Where the batches were timed.
    """
    known = {fact.name: fact for fact in facts}
    tasks = {}
    for task in configured.data.tasks:
        if task.name in trials:
            fitting = known[task.name].fitting
            assert fitting is not None
            rows = len(fitting.items)
            tasks[task.name] = TaskEstimate(configured.batches(task, rows), trials[task.name])
    answers, unread = _answers(configured)
    each = _seconds_per_answer(facts)
    return RunEstimate(
        tasks,
        _prepare_seconds(configured, facts, trials),
        0.0 if answers == 0 else None if each is None else answers * each,
        answers,
        footprint,
        device,
        [*unread, *_notes(configured, tasks)],
    )


def _answers(configured: Configured) -> tuple[int, list[str]]:
    """Greedy answers for the retention matrix: a row before the first stage and after each.

    Also a remark on each task or suite that cannot be read: the run would stop there.
    """
    measured, found, unread = configured.measured, 0, []
    if not measured.enabled:
        return 0, []
    for task in configured.data.evaluated:
        if isinstance(task, Suite):
            unread.append(f"The suite {task.name!r} measures by itself; its time is left out.")
            continue
        try:
            there = len(task.examples(measured.split)) or len(task.examples("validation"))
        except (ValueError, OSError) as error:
            unread.append(f"{task.name!r} cannot be evaluated: {error}")
            continue
        found += there if measured.limit is None else min(there, measured.limit)
    return (len(configured.data.tasks) + 1) * found, unread


def _seconds_per_answer(facts: Sequence[TaskFacts]) -> float | None:
    speeds = [fact.speed for fact in facts if fact.speed is not None]
    if not speeds:
        return None
    return sum(s.seconds for s in speeds) / sum(s.examples for s in speeds)


def _prepare_seconds(
    configured: Configured, facts: Sequence[TaskFacts], trials: Mapping[str, Trial]
) -> float:
    """A method's own preparations, once per run, grown from the trial's answers to all."""
    found = [trial for trial in trials.values() if trial.prepared]
    module = configured.module
    if not found or not isinstance(module, OfflineModule):
        return 0.0
    if isinstance(module, TeacherSampleModule):
        prompts = sum(len(fact.fitting.items) for fact in facts if fact.fitting)
    else:
        prompts = sum(len(task.examples("train")) for task in configured.data.general)
    each = max(trial.prepare_seconds / trial.prepared for trial in found)
    return each * prompts * module.answers_per_prompt


def _notes(configured: Configured, tasks: Mapping[str, TaskEstimate]) -> list[str]:
    notes = [
        "Batches were timed one by one in the real training loop, at a learning rate of 0; logging "
        "of costly figures, checkpoints and reports are left out.",
    ]
    if configured.measured.kl_limit and configured.measured.enabled:
        notes.append("The passes for KL(base ‖ student) are left out of the evaluation's time.")
    if configured.data.mixtures:
        notes.append("Rows that mixtures add in later stages are left out.")
    if configured.processes != 1:
        count = configured.processes or "as many as there are"
        notes.append(f"Timed in one process; the run is configured for {count}.")
    left = [task.name for task in configured.data.tasks if task.name not in tasks]
    if left:
        notes.append(f"Without {', '.join(left)}, where nothing could be measured.")
    return notes
