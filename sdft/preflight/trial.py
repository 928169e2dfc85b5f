"""A few timed steps of the real training loop at a learning rate of zero: nothing is learnt.

The steps run in memory, on a model of their own, without logger, checkpoints or report. Only time,
tokens, memory and whether the gradient is finite are taken from them.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sdft.cost import Ledger
from sdft.data import ContinualDataModule
from sdft.encoded import Encoded
from sdft.examples import Example
from sdft.memory import MemoryMeter, process_peak
from sdft.methods.offline import OfflineModule
from sdft.preflight.configured import Configured
from sdft.student import StudentModule
from sdft.tasks import Split, Task

_STEP = ("generate", "score", "update", "track")


@dataclass(frozen=True)
class Trial:
    """What timed steps have cost.

    Attributes:
        seconds: Of one batch; None where no step could be timed, and `problem` says why.
        phases: Seconds of one batch by phase.
        tokens: Tokens through a model in one batch, by phase.
        prepare_seconds: Before the first step, for a method that has answers made first.
        prepared: Answers that were made for it.
        peak_bytes: The most memory that was taken.
        finite: Whether all gradients were finite numbers.
        steps: How many batches the figures are the mean of.
        problem: Why there is nothing.
    """

    seconds: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    prepare_seconds: float = 0.0
    prepared: int = 0
    peak_bytes: int = 0
    finite: bool = True
    steps: int = 0
    problem: str = ""


def run_trial(configured: Configured, task: Task, items: Sequence[Encoded], steps: int) -> Trial:
    """Time a task's batches; the first one, which warms up, does not count if there are more.

    Args:
        configured: The run; its module is spoilt for training afterwards.
        task: The task.
        items: Examples that fit, enough for the batches or else used again.
        steps: How many batches.
    """
    module = configured.module
    data = trial_data(configured.data, task, items, steps)
    at_rest(module)
    watch = Stopwatch()
    trainer = configured.trainer([watch])
    module.phases.totals = Ledger()
    module.phases.memory = MemoryMeter(trainer.strategy.root_device)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # methods say what they prepare
            trainer.fit(module, datamodule=data)
    except (RuntimeError, ValueError) as error:  # out of memory, and what a method refuses
        return Trial(problem=f"no step could be timed: {_first_line(error)}")
    finally:
        module.phases.enter("")
        gc.collect()
    book = module.book if isinstance(module, OfflineModule) else None
    on_gpu = trainer.strategy.root_device.type == "cuda"
    peak = module.phases.totals.total().peak_memory_bytes
    return replace(
        watch.trial(),
        prepare_seconds=module.phases.totals["prepare"].seconds,
        prepared=len(book.answers) if book is not None else 0,
        peak_bytes=peak if on_gpu else max(peak, process_peak()),
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def trial_data(
    data: ContinualDataModule, task: Task, items: Sequence[Encoded], steps: int
) -> ContinualDataModule:
    """The task stream cut to one task, so many steps and one batch of general prompts each."""
    cut = copy.copy(data)
    cut.tasks = [_Cut(task, [item.example for item in items], steps)]
    cut.general = [
        _Cut(own, own.examples("train")[: data.batch_size], None) for own in data.general
    ]
    cut.suites, cut.evaluating = [], []
    cut._encoded, cut._loader = {}, None
    return cut


class _Cut(Task):
    """Some training examples of a task."""

    def __init__(self, task: Task, examples: Sequence[Example], steps: int | None) -> None:
        super().__init__(task.name, task.scorer, steps)
        self._examples = list(examples)

    def examples(self, split: Split) -> Sequence[Example]:
        return self._examples if split == "train" else []


def at_rest(module: StudentModule) -> None:
    """Make a module whose steps cost what they will and change no weight, and have it load anew.

    Rollouts drawn ahead and short horizons would make the first steps unlike the others.
    """
    module.optimizer = partial(_at_rate_zero, module.optimizer)
    module.scheduler = partial(LambdaLR, lr_lambda=lambda step: 1.0)
    module.student = None
    for name in module.copies:
        setattr(module, name, None)
    for name, value in (("updates_per_generation", 1), ("horizon", None)):
        if hasattr(module, name):
            setattr(module, name, value)


def _at_rate_zero(make: Any, parameters: Iterable[Parameter]) -> Optimizer:
    optimizer: Optimizer = make(parameters)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    return optimizer


class Stopwatch(Callback):
    """Takes the time of each batch, and looks whether gradients are finite.

    Attributes:
        seconds: Of each batch, its optimizer step included.
        ledgers: What each batch has cost by phase.
        finite: Whether all gradients were.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.ledgers: list[Ledger] = []
        self.finite = True
        self._begin = 0.0
        self._before = Ledger()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A batch begins."""
        self._before = _copy(pl_module)
        self._begin = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """See whether the gradient is one; zero it where it is not, for 0 · ∞ is no number."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                    self.finite = False
                    parameter.grad.zero_()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A batch has ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begin)
        assert isinstance(pl_module, StudentModule)
        pl_module.phases.enter(pl_module.phases.current)
        self.ledgers.append(_spent(self._before, _copy(pl_module)))

    def trial(self) -> Trial:
        """The mean of the batches, the first left out if there are more."""
        if not self.seconds:
            return Trial(problem="no step could be timed: the method trains on no batch")
        seconds, ledgers = self.seconds[1:] or self.seconds, self.ledgers[1:] or self.ledgers
        count = len(seconds)
        names = [name for name in _STEP if any(own[name].seconds for own in ledgers)]
        return Trial(
            seconds=sum(seconds) / count,
            phases={name: sum(own[name].seconds for own in ledgers) / count for name in names},
            tokens={
                name: sum(own[name].tokens for own in ledgers) / count
                for name in names
                if name != "track"
            },
            finite=self.finite,
            steps=count,
        )


def _copy(module: Any) -> Ledger:
    totals = Ledger()
    totals.load_state_dict(module.phases.totals.state_dict())
    return totals


def _spent(before: Ledger, after: Ledger) -> Ledger:
    spent = Ledger()
    for name, cost in after.phases.items():
        spent.add(
            name,
            replace(
                cost,
                seconds=cost.seconds - before[name].seconds,
                tokens=cost.tokens - before[name].tokens,
            ),
        )
    return spent
