"""The task stream: one task per stage, one stage per Lightning epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from lightning.pytorch import LightningDataModule

from sdft.batch import Batch, Origin
from sdft.encoded import Encoded, encode_split
from sdft.loaders import evaluation_loader, own_share
from sdft.mixtures import MIXTURES, Mixture, stage_parts
from sdft.prompts import Encoder
from sdft.seeding import run_seed
from sdft.stages import StageLoader, batches_in_stage, stage_batches, steps_of_parts
from sdft.tasks import Split, Task


class Student(Protocol):
    """What the task stream asks of the LightningModule."""

    @property
    def encoder(self) -> Encoder:
        """Turns examples into prompts."""

    @property
    def prompt_room(self) -> int | None:
        """Tokens that the model's context leaves for a prompt; None when unlimited."""

    @property
    def method(self) -> str:
        """The method's name."""

    @property
    def learns_from(self) -> frozenset[Origin]:
        """Which rows of a batch it can be trained on."""

    @property
    def needs_rows(self) -> Origin | None:
        """Rows without which the method would be another."""

    @property
    def trains(self) -> bool:
        """Whether it changes the student at all."""

    def takes(self, prompt: Encoded) -> bool:
        """Whether a general prompt is of use to it."""


class ContinualDataModule(LightningDataModule):
    """Trains on one task after another and knows everything that is evaluated.

    The stage is `trainer.current_epoch`; nothing about it is kept here, so a resumed run continues
    exactly where it stopped. An example whose prompt exceeds a limit is dropped, counted and
    reported, never cut.

    Args:
        tasks: The sequence to learn, in order.
        suites: Prior abilities: only ever evaluated.
        batch_size: Prompts per training batch; several processes deal them among themselves, so
            that a run learns from the same batches whatever their number.
        eval_batch_size: Prompts per batch in evaluation, of all processes together, too.
        steps: Optimizer steps per stage, for tasks that set neither `steps` nor `epochs`.
        epochs: Passes per stage, for tasks that set neither; 1 when nothing is set anywhere.
        shuffle: Shuffle each pass over a task.
        max_student_tokens: Longest student prompt.
        max_teacher_tokens: Longest teacher prompt (with the demonstration).
        reset_optimizer_between_tasks: Forget the optimizer's moments when a stage begins.
        mixtures: What else each stage trains on (`sdft.mixtures`: replay, general prompts, all
            tasks at once), applied in this order.
        general: Tasks whose training prompts are the general prompts that some methods and
            mixtures distil the base's behaviour on; answers and demonstrations are ignored.
        from_base_each_task: Learn every task from the base: one model per task. The retention
            matrix then shows a router that gives each task's prompts to its own model.

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
        mixtures: list[Mixture] | None = None,
        general: list[Task] | None = None,
        from_base_each_task: bool = False,
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
        self.mixtures = list(mixtures or [])
        self.general = list(general or [])
        self.from_base_each_task = from_base_each_task
        self.evaluating: list[Task] = []
        self._encoded: dict[tuple[Task, Split, bool], list[Encoded]] = {}
        self._loader: StageLoader[Encoded, Batch] | None = None
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
        return self._cached(task, split, with_teacher=split == "train")

    def general_prompts(self) -> list[Encoded]:
        """The training prompts of the general tasks that fit and that the method takes.

        Raises:
            ValueError: There are none.
        """
        items = [i for task in self.general for i in self._cached(task, "train", False)]
        if not items:
            names = ", ".join(repr(task.name) for task in self.general)
            found = f"{names}: no training examples" if names else "no task"
            raise ValueError(
                f"data.general: this method or mixture needs general prompts, found {found}; give "
                "tasks with a train split (answers are ignored)"
            )
        return [item for item in items if self._student.takes(item)]

    def _cached(self, task: Task, split: Split, with_teacher: bool) -> list[Encoded]:
        key = (task, split, with_teacher)
        if key not in self._encoded:
            encoder = self._student.encoder
            self._encoded[key] = encode_split(encoder, task, split, with_teacher, *self.limits)
        return self._encoded[key]

    @property
    def limits(self) -> tuple[int, int]:
        """Longest student and teacher prompt that is kept, in tokens."""
        return self._limit(self.max_student_tokens), self._limit(self.max_teacher_tokens)

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
        """Training batches of a stage; one for a method that trains nothing."""
        if not self._student.trains:
            return 1
        task = self.tasks[stage]
        return self.batches_of(task, len(self.encoded(task, "train")))

    def batches_of(self, task: Task, rows: int) -> int:
        """Training batches of a task's stage, were it to have so many examples."""
        steps, epochs = task.steps, task.epochs
        if steps is None and epochs is None:
            steps, epochs = self.steps, self.epochs if self.steps else (self.epochs or 1)
        assert self.trainer is not None
        accumulate = self.trainer.accumulate_grad_batches
        return batches_in_stage(rows, self.batch_size, steps, epochs, accumulate)

    def schedule_steps(self) -> list[int]:
        """Optimizer steps of each stage, as planned."""
        return [sum(parts) for parts in self.schedule_parts()]

    def schedule_parts(self) -> list[list[int]]:
        """Optimizer steps of each stage's parts, which have a learning-rate schedule each."""
        assert self.trainer is not None
        accumulate = self.trainer.accumulate_grad_batches
        stages = map(self.stage_batches, range(len(self.tasks)))
        return [steps_of_parts(stage_parts(self.mixtures, n), accumulate) for n in stages]

    def own_batches(self, stage: int) -> list[list[Encoded]]:
        """The batches of the stage's own task, before any mixture."""
        items = self.encoded(self.tasks[stage], "train")
        count = self.stage_batches(stage)
        rows = stage_batches(len(items), self.batch_size, run_seed(), stage, count, self.shuffle)
        return [[items[row] for row in batch] for batch in rows]

    def mixed_batches(self, stage: int) -> list[list[Encoded]]:
        """The batches that the stage trains on."""
        own = batches = self.own_batches(stage)
        for mixture in self.mixtures:
            batches = mixture.mix(self, stage, batches, run_seed())
        assert len(batches) == len(own), "a mixture keeps the number of batches"
        return batches

    # ---------------------------------------------------------------- Lightning

    def setup(self, stage: str) -> None:
        """Encode the training examples; one epoch per stage, with a loader of its own."""
        if stage != "fit":
            return
        assert self.trainer is not None
        for task in self.tasks:
            if not self.encoded(task, "train"):
                raise ValueError(f"task {task.name!r} has no training examples")
        self._check_mixtures()
        limit = self.trainer.max_epochs
        stages = len(self.tasks)
        self.trainer.fit_loop.max_epochs = stages if limit in (None, -1) else min(stages, limit)
        self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    def _check_mixtures(self) -> None:
        needed = self._student.needs_rows
        if needed and not any(mixture.origin == needed for mixture in self.mixtures):
            fitting = [kind.__name__ for kind in MIXTURES if kind.origin == needed]
            raise ValueError(
                f"the method {self._student.method!r} needs {needed!r} rows: add "
                f"sdft.mixtures.{' or '.join(fitting)} to data.mixtures"
            )
        for mixture in self.mixtures:
            if mixture.origin not in self._student.learns_from:
                raise ValueError(
                    f"data.mixtures: {type(mixture).__name__} adds {mixture.origin!r} rows, which "
                    f"the method {self._student.method!r} cannot learn from"
                )
            if mixture.origin == "general":
                self.general_prompts()

    def train_dataloader(self) -> StageLoader[Encoded, Batch]:
        """The current stage's batches."""
        assert self.trainer is not None
        stage = min(self.trainer.current_epoch, len(self.tasks) - 1)
        self._loader = StageLoader(self.mixed_batches(stage), own_share(), stage)
        return self._loader

    def coming(self, start: int, end: int) -> list[Batch]:
        """Batches of the stage under way, to look ahead: none is handed out by it.

        Args:
            start: Index of the first one in the stage.
            end: Index behind the last one; a stage that ends earlier has fewer.
        """
        assert self._loader is not None, "no stage is under way"
        return self._loader.coming(start, end)

    def end_stage(self) -> None:
        """Hand out no further batch of the stage under way: one half of `sdft.run.end_stage`."""
        assert self._loader is not None, "no stage is under way"
        self._loader.end()

    @property
    def stage_ended(self) -> bool:
        """Whether the stage under way ends before its last batch."""
        return self._loader is not None and self._loader.ended

    def val_dataloader(self) -> list[Any]:
        """In `fit` every task, in `validate` every suite too: those with a validation split."""
        assert self.trainer is not None
        # The same loaders in every stage: Lightning refuses a log key that changes its loader.
        fitting = self.trainer.state.fn == "fit"
        return self._loaders(self.tasks if fitting else self.evaluated, "validation")

    def test_dataloader(self) -> list[Any]:
        """Every task and suite that has a test split."""
        return self._loaders(self.evaluated, "test")

    def predict_dataloader(self) -> list[Any]:
        """Every task and suite that has a test split."""
        return self.test_dataloader()

    def _loaders(self, tasks: Sequence[Task], split: Split) -> list[Any]:
        self.evaluating = [task for task in tasks if self.encoded(task, split)]
        size = self.eval_batch_size
        return [evaluation_loader(self.encoded(task, split), size) for task in self.evaluating]

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The sequence that a checkpoint belongs to, and the stage that it was written in."""
        assert self.trainer is not None
        names = {"tasks": [task.name for task in self.tasks]}
        names["suites"] = [suite.name for suite in self.suites]
        return {**names, "stage": self.trainer.current_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of another sequence; tasks that are still to come may differ.

        Raises:
            ValueError: Up to the checkpoint's stage, its tasks are not this run's.
        """
        names, found = [task.name for task in self.tasks], state_dict["tasks"]
        begun = state_dict.get("stage", max(len(found), len(names))) + 1
        if found[:begun] != names[:begun]:
            raise ValueError(
                f"the checkpoint belongs to the task sequence {found} and was written in stage "
                f"{min(begun, len(found))}; this run's is {names}: only tasks after that stage may "
                "differ"
            )
