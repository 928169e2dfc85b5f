"""The task stream: one task per stage, one stage per Lightning epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from sdft.batch import Batch
from sdft.examples import Example
from sdft.prompts import Encoder
from sdft.seeding import run_seed
from sdft.stages import StageLoader, batches_in_stage, stage_batches
from sdft.tasks import Split, Task

log = logging.getLogger(__name__)


class Student(Protocol):
    """What the task stream asks of the LightningModule."""

    @property
    def encoder(self) -> Encoder:
        """Turns examples into prompts."""

    @property
    def prompt_room(self) -> int | None:
        """Tokens that the model's context leaves for a prompt; None when unlimited."""


@dataclass(frozen=True)
class Encoded:
    """An example with the token ids of its prompts; `teacher_ids` is empty when only evaluated."""

    example: Example
    student_ids: list[int]
    teacher_ids: list[int]


class ContinualDataModule(LightningDataModule):
    """Trains on one task after another and knows everything that is evaluated.

    The stage is `trainer.current_epoch`; nothing about it is kept here, so a resumed run continues
    exactly where it stopped. An example whose prompt exceeds a limit is dropped, counted and
    reported, never cut.

    Args:
        tasks: The sequence to learn, in order.
        suites: Prior abilities: only ever evaluated.
        batch_size: Prompts per training batch.
        eval_batch_size: Prompts per batch in evaluation.
        steps: Optimizer steps per stage, for tasks that set neither `steps` nor `epochs`.
        epochs: Passes per stage, for tasks that set neither; 1 when nothing is set anywhere.
        shuffle: Shuffle each pass over a task.
        max_student_tokens: Longest student prompt.
        max_teacher_tokens: Longest teacher prompt (with the demonstration).
        reset_optimizer_between_tasks: Forget the optimizer's moments when a stage begins.

    Attributes:
        evaluating: The task of each dataloader of the evaluation under way.

    Raises:
        ValueError: No task, two of one name, or a number out of range.
    """

    def __init__(
        self,
        tasks: list[Task],
        suites: list[Task] | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        steps: int | None = None,
        epochs: int | None = None,
        shuffle: bool = True,
        max_student_tokens: int = 1024,
        max_teacher_tokens: int = 2048,
        reset_optimizer_between_tasks: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.suites = list(suites or [])
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.steps = steps
        self.epochs = epochs
        self.shuffle = shuffle
        self.max_student_tokens = max_student_tokens
        self.max_teacher_tokens = max_teacher_tokens
        self.reset_optimizer_between_tasks = reset_optimizer_between_tasks
        self.evaluating: list[Task] = []
        self._encoded: dict[tuple[str, Split], list[Encoded]] = {}
        self._check()

    def _check(self) -> None:
        if not self.tasks:
            raise ValueError("data.tasks is empty: give at least one task")
        names = [task.name for task in self.evaluated]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tasks or suites are named {name!r}: names must differ")
        for key in ("batch_size", "eval_batch_size", "max_student_tokens", "max_teacher_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key} must be at least 1, found {getattr(self, key)}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("data.steps and data.epochs exclude each other: set one")
        for key in ("steps", "epochs"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"data.{key} must be at least 1, found {getattr(self, key)}")

    # ---------------------------------------------------------------- what there is

    @property
    def evaluated(self) -> list[Task]:
        """Tasks in sequence order, then suites: the columns of the retention matrix."""
        return [*self.tasks, *self.suites]

    def encoded(self, task: Task, split: Split) -> list[Encoded]:
        """The examples of a split that fit the length limits, encoded; teacher prompts for train.

        Raises:
            ValueError: Not one example of a split fits.
        """
        key = (task.name, split)
        if key not in self._encoded:
            self._encoded[key] = self._encode(task, split)
        return self._encoded[key]

    def _encode(self, task: Task, split: Split) -> list[Encoded]:
        examples = task.examples(split)
        student_limit = self._limit(self.max_student_tokens)
        teacher_limit = self._limit(self.max_teacher_tokens)
        encoded = [self._encode_one(task, example, split) for example in examples]
        fits_student = [item for item in encoded if len(item.student_ids) <= student_limit]
        fits = [item for item in fits_student if len(item.teacher_ids) <= teacher_limit]
        dropped_student = len(encoded) - len(fits_student)
        dropped_teacher = len(fits_student) - len(fits)
        if len(fits) < len(encoded):
            message = (
                f"task {task.name!r}, {split}: dropped {len(encoded) - len(fits)} of "
                f"{len(encoded)} examples ({dropped_student} student prompts over {student_limit} "
                f"tokens, {dropped_teacher} teacher prompts over {teacher_limit})"
            )
            if not fits:
                raise ValueError(
                    f"{message}: none is left; raise data.max_student_tokens or "
                    "data.max_teacher_tokens, lower model.max_new_tokens, or use a model with a "
                    "longer context"
                )
            log.warning(message)
        return fits

    def _encode_one(self, task: Task, example: Example, split: Split) -> Encoded:
        encoder = self._student.encoder
        try:
            teacher_ids = encoder.teacher_ids(example) if split == "train" else []
            return Encoded(example, encoder.student_ids(example), teacher_ids)
        except ValueError as error:
            raise ValueError(f"task {task.name!r}, {split}: {error}") from error

    def _limit(self, tokens: int) -> int:
        """`tokens`, or what the model's context leaves for a prompt where that is less."""
        room = self._student.prompt_room
        return tokens if room is None else min(tokens, room)

    @property
    def _student(self) -> Student:
        assert self.trainer is not None, "the task stream works inside a Trainer"
        return cast(Student, self.trainer.lightning_module)

    # ---------------------------------------------------------------- the schedule

    def stage_batches(self, stage: int) -> int:
        """Training batches of a stage."""
        task = self.tasks[stage]
        steps, epochs = task.steps, task.epochs
        if steps is None and epochs is None:
            steps, epochs = self.steps, self.epochs if self.steps else (self.epochs or 1)
        assert self.trainer is not None
        accumulate = self.trainer.accumulate_grad_batches
        rows = len(self.encoded(task, "train"))
        return batches_in_stage(rows, self.batch_size, steps, epochs, accumulate)

    def stage_steps(self) -> list[int]:
        """Optimizer steps of each stage."""
        assert self.trainer is not None
        accumulate = self.trainer.accumulate_grad_batches
        return [
            math.ceil(self.stage_batches(stage) / accumulate) for stage in range(len(self.tasks))
        ]

    # ---------------------------------------------------------------- Lightning

    def setup(self, stage: str) -> None:
        """Encode the training examples; one epoch per stage, with a loader of its own."""
        if stage != "fit":
            return
        assert self.trainer is not None
        if self.trainer.world_size > 1:
            raise ValueError(
                f"the task stream runs in one process, found {self.trainer.world_size}: set "
                "trainer.devices to 1"
            )
        for task in self.tasks:
            if not self.encoded(task, "train"):
                raise ValueError(f"task {task.name!r} has no training examples")
        limit = self.trainer.max_epochs
        stages = len(self.tasks)
        self.trainer.fit_loop.max_epochs = stages if limit in (None, -1) else min(stages, limit)
        self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    def train_dataloader(self) -> StageLoader[Encoded, Batch]:
        """The current stage's batches."""
        assert self.trainer is not None
        stage = min(self.trainer.current_epoch, len(self.tasks) - 1)
        items = self.encoded(self.tasks[stage], "train")
        batches = stage_batches(
            len(items), self.batch_size, run_seed(), stage, self.stage_batches(stage), self.shuffle
        )
        return StageLoader(items, batches, collate, stage)

    def val_dataloader(self) -> list[DataLoader[Encoded]]:
        """In `fit` every task, in `validate` every suite too: those with a validation split."""
        assert self.trainer is not None
        # The same loaders in every stage: Lightning refuses a log key that changes its loader.
        fitting = self.trainer.state.fn == "fit"
        return self._loaders(self.tasks if fitting else self.evaluated, "validation")

    def test_dataloader(self) -> list[DataLoader[Encoded]]:
        """Every task and suite that has a test split."""
        return self._loaders(self.evaluated, "test")

    def predict_dataloader(self) -> list[DataLoader[Encoded]]:
        """Every task and suite that has a test split."""
        return self.test_dataloader()

    def _loaders(self, tasks: Sequence[Task], split: Split) -> list[DataLoader[Encoded]]:
        self.evaluating = [task for task in tasks if self.encoded(task, split)]
        return [
            DataLoader(
                cast(Any, self.encoded(task, split)),
                batch_size=self.eval_batch_size,  # by name: `predict` re-creates the loader so
                collate_fn=collate,
            )
            for task in self.evaluating
        ]

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The sequence that a checkpoint belongs to."""
        return {"tasks": [task.name for task in self.tasks]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of another sequence.

        Raises:
            ValueError: Its tasks are not this run's.
        """
        names = [task.name for task in self.tasks]
        if state_dict["tasks"] != names:
            raise ValueError(
                f"the checkpoint belongs to the task sequence {state_dict['tasks']}, this run's is "
                f"{names}: resume with the configuration that made it"
            )


def collate(items: Sequence[Encoded]) -> Batch:
    """A batch of encoded examples."""
    return Batch(
        [item.example for item in items],
        [item.student_ids for item in items],
        [item.teacher_ids for item in items],
    )
