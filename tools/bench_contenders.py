"""Contenders of the step benchmark: training loops that make one step when told to.

Each runs its own `Trainer.fit` in a thread and waits before every batch, so that the steps of all
contenders can be interleaved in one process and nothing of the real loop is left out.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench_material import TEMPLATE, Setting, make_texts
from lightning.pytorch import Callback, Trainer

from sdft import ContinualDataModule, Example, PythonTask, SDFTModule, StudentModule
from sdft.batch import Batch
from sdft.callbacks import EMATeacher
from sdft.cost import Ledger
from sdft.methods import SFTModule
from sdft.rollout import Rollout


class Baton(Callback):
    """Lets the loop make one step each time that `go` is released."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.phases: dict[str, float] = {}
        self.stopped = False

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Say that the step before is over; wait for the next."""
        self.done.release()
        self.go.acquire()
        if self.stopped:
            raise KeyboardInterrupt

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Note the phases' seconds."""
        clock = pl_module.phases
        clock.enter("")
        if clock.totals is not None:
            self.phases = {name: cost.seconds for name, cost in clock.totals.phases.items()}
        clock.totals = Ledger()


class Contender:
    """A method under its own trainer, one step at a time.

    Args:
        module: The method.
        setting: Sizes.
        steps: How many steps it will be asked for at most.
    """

    def __init__(self, module: StudentModule, setting: Setting, steps: int) -> None:
        self.module = module
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
            callbacks=[EMATeacher(rate=0.01), self.baton],
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

    def step(self) -> float:
        """Make one step; its seconds."""
        begun = time.perf_counter()
        self.baton.go.release()
        self._wait()
        return time.perf_counter() - begun

    @property
    def phases(self) -> dict[str, float]:
        """Seconds per phase of the last step."""
        return self.baton.phases

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
    """SFT on the completions that another module has just sampled.

    Args:
        source: Whose completions.
        kwargs: See `StudentModule`.
    """

    def __init__(self, source: RecordingSDFT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._source = [source]  # no submodule

    def targets(self, batch: Batch) -> Rollout:
        """The source's completions."""
        return self._source[0].completion


class TRLContender:
    """TRL's trainer in another environment, a process that waits for a line before each step.

    Args:
        python: The interpreter of an environment with TRL.
        folder: Model and tokenizer.
        setting: Sizes.
        steps: How many steps it will be asked for at most.
    """

    phases: dict[str, float]

    def __init__(self, python: str, folder: Path, setting: Setting, steps: int) -> None:
        self.phases = {}
        script = str(Path(__file__).with_name("bench_trl.py"))
        command = [python, script, str(folder), json.dumps(asdict(setting)), str(steps)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        if self._line() != "ready":
            raise RuntimeError(f"TRL did not start: run {' '.join(command)} to see why")

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def step(self) -> float:
        """Make one step; its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def options(folder: Path, setting: Setting) -> dict[str, Any]:
    """Arguments that all of our modules share."""
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    return {
        "model_name": str(folder),
        "max_new_tokens": setting.completion,
        "teacher_template": TEMPLATE,
        "optimizer": lambda parameters: optimizer(parameters, lr=1e-5, weight_decay=0.0),
        "track_base": False,
    }
