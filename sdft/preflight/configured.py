"""The configuration of `fit`, instantiated without fitting: the module, the data and a trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, Trainer

from sdft.data import ContinualDataModule
from sdft.evaluation import Artifacts
from sdft.seeding import run_seed
from sdft.student import StudentModule
from sdft.tasks import Split

HERE: dict[str, Any] = {
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "logger": False,
    "profiler": None,
    "callbacks": [],
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accumulate_grad_batches": 1,
    "fast_dev_run": False,
    "limit_train_batches": None,
    "limit_val_batches": 0,
    "overfit_batches": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "max_time": None,
}
"""How the trainer of a preflight differs from the run's: one process, and nothing is left."""


@dataclass(frozen=True)
class Measured:
    """What the run's retention matrix will evaluate.

    Attributes:
        enabled: Whether there is one.
        split: Which split.
        limit: Examples per task and suite; all when None.
        kl_limit: Examples of them for KL(base ‖ student); 0 without it.
        artifacts: Tells artifacts of the demonstration.
    """

    enabled: bool
    split: Split
    limit: int | None
    kl_limit: int
    artifacts: Artifacts


class Configured:
    """A run as its configuration has it, not begun.

    Args:
        commandline: Has parsed and instantiated it (`sdft.preflight.command`).

    Attributes:
        module: The method; its model is not loaded yet.
        data: The task stream.
        teacher: What moves the teacher.
        processes: How many the run is configured for; None where the machine decides.
        accumulate: Batches per optimizer step.
        precision: The trainer's.
        strategy: The trainer's.
        root: `trainer.default_root_dir`.
        measured: What the run will evaluate.
        seed: The run's.
    """

    def __init__(self, commandline: Any) -> None:
        self._cli = commandline
        self.module = cast(StudentModule, self._cli.model)
        self.data = cast(ContinualDataModule, self._cli.datamodule)
        self.teacher: Any = self._cli._get(self._cli.config_init, "teacher")
        trainer = self._cli._get(self._cli.config_init, "trainer")
        self.processes = _processes(trainer["devices"], trainer["num_nodes"])
        self.accumulate = int(trainer["accumulate_grad_batches"] or 1)
        self.precision = str(trainer["precision"] or "32-true")
        self.strategy = str(trainer["strategy"])
        self.root = Path(trainer["default_root_dir"] or Path.cwd())
        self.measured = _measured(self._cli._get(self._cli.config_init, "retention"))
        self.seed = run_seed()

    def trainer(self, callbacks: list[Callback]) -> Trainer:
        """A new trainer like the run's, in one process.

        Args:
            callbacks: Its callbacks beside the teacher's.
        """
        return cast(Trainer, self._cli.instantiate_trainer(callbacks=[self.teacher, *callbacks]))

    def put_in_place(self) -> None:
        """Load the model and put it where training would, in the same precision."""
        trainer: Any = self._cli.trainer
        module, data = self.module, self.data
        trainer.strategy.connect(module)
        trainer.datamodule, data.trainer, module.trainer = data, trainer, trainer
        module.model  # noqa: B018 - loads on first use
        trainer.precision_plugin.convert_module(module)
        module.to(trainer.strategy.root_device)

    def batches(self, task: Any, rows: int) -> int:
        """Batches of a task's stage in the run.

        Args:
            task: The task.
            rows: Its training examples that fit.
        """
        per_step = self.data.batches_of(task, rows)
        by_steps = task.steps is not None or (task.epochs is None and self.data.steps is not None)
        return per_step * self.accumulate if by_steps else per_step


def _processes(devices: Any, nodes: int) -> int | None:
    if isinstance(devices, list):
        return len(devices) * nodes
    if isinstance(devices, str) and not devices.isdigit():
        return None
    count = int(devices)
    return count * nodes if count > 0 else None


def _measured(retention: Any) -> Measured:
    evaluator = retention.evaluator
    kl_limit = 0 if evaluator.base is None else int(evaluator.base.limit)
    return Measured(
        retention.enabled, retention.split, retention.limit, kl_limit, evaluator.artifacts
    )
