"""Contenders of the step benchmark: training loops that make one step when told to.

Each runs its own `Trainer.fit` in a thread and waits before every batch, so that nothing of the
real loop is left out. To be timed, each runs in a process of its own (`bench_remote`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from bench_laps import Lap
from bench_material import SKIPPED, make_texts
from bench_models import Plan, make_module
from lightning.pytorch import Callback, Trainer

from sdft import ContinualDataModule, Example, PythonTask, SDFTModule, StudentModule
from sdft.batch import Batch, pad
from sdft.callbacks import EMATeacher
from sdft.cost import Ledger
from sdft.methods import SFTModule
from sdft.rollout import GenerateEngine, Rollout


class Baton(Callback):
    """Lets the loop make one step each time that `go` is released."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.ledger = Ledger()
        self.stopped = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Say that the step before is over; wait for the next."""
        self.done.release()
        self.go.acquire()
        if self.stopped:
            raise KeyboardInterrupt
        pl_module.phases.totals = Ledger()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Note what the phases have cost."""
        clock = pl_module.phases
        clock.enter("")
        if clock.totals is not None:
            self.ledger = clock.totals


class Contender:
    """A method under its own trainer, one step at a time.

    Args:
        module: The method.
        plan: Model and sizes.
        steps: How many steps it will be asked for at most.
    """

    def __init__(self, module: StudentModule, plan: Plan, steps: int) -> None:
        self.module = module
        setting = plan.setting
        self.baton = Baton()
        self.error: BaseException | None = None
        cuda = torch.cuda.is_available()
        self.trainer = Trainer(
            max_epochs=-1,
            accelerator="gpu" if cuda else "cpu",
            devices=1,
            precision="bf16-mixed" if cuda else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            callbacks=[EMATeacher(rate=0.01, storage=plan.teacher_storage), self.baton],
        )
        texts = make_texts(setting, setting.batch * steps)
        examples = [
            Example(({"role": "user", "content": prompt},), shown, demonstration=shown)
            for prompt, shown in texts
        ]
        self.data = ContinualDataModule(
            [PythonTask("task", train=examples)], batch_size=setting.batch, shuffle=False
        )
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self._wait()

    def _run(self) -> None:
        try:
            self.trainer.fit(self.module, datamodule=self.data)
        except BaseException as error:  # handed to the main thread
            self.error = error
            self.baton.done.release()

    def _wait(self) -> None:
        self.baton.done.acquire()
        if self.error is not None:
            raise RuntimeError(f"{type(self.module).__name__} failed") from self.error

    def step(self) -> Lap:
        """Make one step."""
        begun = time.perf_counter()
        self.baton.go.release()
        self._wait()
        seconds = time.perf_counter() - begun
        phases = self.baton.ledger.phases
        prompts: list[int] = []
        completions: list[int] = []
        if isinstance(self.module, RecordingSDFT):
            prompts = [len(ids) for ids in self.module.batch.student_ids]
            completions = self.module.completion.lengths_B.tolist()
        return Lap(
            seconds,
            {name: cost.seconds for name, cost in phases.items()},
            {name: cost.flops for name, cost in phases.items()},
            prompts,
            completions,
        )

    def close(self) -> None:
        """End the loop."""
        self.baton.stopped = True
        self.baton.go.release()
        self.thread.join(timeout=30)


class RecordingSDFT(SDFTModule):
    """SDFT that keeps its last completions, for SFT on the same tokens."""

    completion: Rollout
    batch: Batch

    def rollout(self, batch: Batch) -> Rollout:
        """Sample and remember."""
        self.batch, self.completion = batch, super().rollout(batch)
        return self.completion


class SameTokensSFT(SFTModule):
    """SFT on completions that were sampled elsewhere; packed and in chunks, as our SFT is.

    Args:
        source: Gives the completions of each step.
        kwargs: See `StudentModule`.
    """

    def __init__(self, source: Callable[[], Rollout], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._source = source

    def targets(self, batch: Batch) -> Rollout:
        """The completions."""
        given = self._source()
        ids_BT, mask_BT = given.ids_BT.to(self.device), given.mask_BT.to(self.device)
        return Rollout(ids_BT, mask_BT, given.truncated_B)


def replayed(lengths: Iterable[list[int]], vocab: int) -> Iterator[Rollout]:
    """Completions of these lengths, of tokens that do not matter.

    Args:
        lengths: Of each completion, step by step.
        vocab: Tokens to draw from.
    """
    for step in lengths:
        ids_BT, mask_BT = pad([[1] * length for length in step], 0, "right", torch.device("cpu"))
        ids_BT = torch.randint(min(vocab, 100), ids_BT.shape)  # every model has as many
        yield Rollout(ids_BT, mask_BT, torch.zeros(len(step), dtype=torch.bool))


def make_contender(
    name: str, plan: Plan, steps: int, source: Callable[[], Rollout] | None = None
) -> Contender:
    """One of ours, ready for its first step.

    Args:
        name: `ours`, `sft` or `generate`.
        plan: Model and sizes.
        steps: How many steps it will be asked for at most.
        source: Where SFT has its completions from.
    """
    if name == "sft":
        assert source is not None
        module = make_module(SameTokensSFT, plan, source=source)
    else:
        engine = GenerateEngine() if name == "generate" else None
        module = make_module(RecordingSDFT, plan, engine=engine, skip_first_tokens=SKIPPED)
    return Contender(module, plan, steps)
