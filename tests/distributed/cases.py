"""Runs that must come out alike in one process and in several: what to run, and what it leaves."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from conftest import make_method, make_module, make_task
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.distributed import get_rank

import sdft.report
from sdft import ContinualDataModule, Example, StudentModule
from sdft.batch import Batch
from sdft.callbacks import (
    CostReport,
    EMATeacher,
    Filters,
    Guard,
    ModelExport,
    Predictions,
    Retention,
    Samples,
    StageCheckpoint,
    StageWatch,
)
from sdft.checks import Check, Facts
from sdft.guard import Action, Rule
from sdft.lora import LoRA
from sdft.losses import sequence_mean, token_divergence
from sdft.methods import (
    AnchorReplayModule,
    CPTModule,
    DFTModule,
    ReinvokeModule,
    SFTModule,
    SoftTargetModule,
    TeacherSampleModule,
)
from sdft.mixtures import GeneralPrompts, PastReplay, Reinvoke
from sdft.module import SDFTModule
from sdft.optim import AdamWBF16
from sdft.penalties import EWC, L2ToStart
from sdft.ranks import rank, ranks
from sdft.rollout import Rollout
from sdft.run import run_folder
from sdft.scorers import Scorer
from sdft.sharding import is_sharded
from sdft.strategies import ReplicatedStrategy, ShardedStrategy

STRATEGIES: dict[str, Callable[[], Any]] = {
    "one": lambda: "auto",
    "ddp": partial(ReplicatedStrategy, timeout_minutes=0.5),
    "fsdp": partial(ShardedStrategy, timeout_minutes=0.5),
    "folder": partial(ShardedStrategy, timeout_minutes=0.5, save_distributed_checkpoint=True),
}
STRATEGIES["folder of one"] = STRATEGIES["folder"]


class Overlap(Scorer):
    """The share of the response that stands in the answer: a score that moves with every token."""

    def __call__(self, response: str, example: Example) -> float:
        words = response.split()
        return sum(word in example.answer.split() for word in words) / max(len(words), 1)


class Some(Check):
    """Drops the answers to most prompts."""

    def __call__(self, text: str, example: Example, facts: Facts) -> str | None:
        return None if example.prompt[0] in "ae" else "not this one"


class OwnLoss(SDFTModule):
    """A loss of one's own: whole logits."""

    method = "own"

    def loss(self, student: Tensor, teacher: Tensor, mask_BT: Tensor) -> Tensor:
        return sequence_mean(2 * token_divergence(student, teacher, 0.5), mask_BT)


class OwnScore(SDFTModule):
    """Logits of its own: whole ones, whose loss can be weighted."""

    method = "own_score"

    def student_logits(self, batch: Batch, completion: Rollout) -> Tensor:
        return 1.5 * super().student_logits(batch, completion)


class Signal(Callback):
    """Sends this process a signal while a step is under way, in one of the processes."""

    def __init__(self, rank: int, step: int, number: int) -> None:
        self.place = (rank, step)
        self.number = number

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if (trainer.global_rank, trainer.global_step + 1) == self.place:
            os.kill(os.getpid(), self.number)


def die(rank: int, call: int, name: str) -> None:
    """Have SIGKILL come in one process as it is about to call a function for the n-th time."""
    owner, _, attribute = name.rpartition(".")
    module = import_module(owner)
    real, left = getattr(module, attribute), call

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= get_rank() == rank
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, attribute, dying)


class Breaking(SDFTModule):
    """Its loss is no number in the second step, in one process alone."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.global_step == 1 and rank() == ranks() - 1 else loss


class Kept(Callback):
    """Keeps every step's logged values, and what each process has drawn."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.rows: list[int] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, idx: int
    ) -> None:
        logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.steps.append({k: v for k, v in logged.items() if "second" not in k})
        self.rows.append(batch.count)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Plain descent: Adam would make a step of a gradient that is nothing but rounding."""
    return torch.optim.SGD(parameters, lr=0.2)


OPTIONS: dict[str, Any] = {
    "optimizer": sgd,
    "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=100),
}


def stream(**options: Any) -> ContinualDataModule:
    """Batches of 5, 2, 5 and 2 rows in each of two stages."""
    tasks = [make_task(name, train=7, test=5, scorer=Overlap()) for name in ("a", "b", "c")]
    settings = {"batch_size": 5, "epochs": 2, "eval_batch_size": 3} | options
    general = [make_task("any", train=5)]
    return ContinualDataModule(tasks[:2], suites=tasks[2:], general=general, **settings)


def sdft_module(folder: Path, kind: type[SDFTModule] = SDFTModule, **options: Any) -> SDFTModule:
    if kind is SDFTModule:
        return make_module(folder, **OPTIONS | options)
    return make_method(kind, folder, **OPTIONS | {"skip_first_tokens": 1} | options)


def other(kind: type[StudentModule]) -> Callable[..., StudentModule]:
    return lambda folder, **options: make_method(kind, folder, **OPTIONS | options)


def always(*actions: Action, patience: int) -> Rule:
    """A rule that everything breaks."""
    return Rule(actions, deviations=None, above=-1.0, patience=patience)


CASES: dict[str, dict[str, Any]] = {
    "sdft": {},
    "sdft, accumulation and clipping": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05},
    "a row at a time": {"data": {"batch_size": 1, "epochs": None, "steps": 2}},
    "few tokens count": {"options": {"skip_first_tokens": 4}},
    "no token counts": {"options": {"skip_first_tokens": 6}},
    "tied embeddings, two rollouts": {"family": "qwen2", "options": {"rollouts_per_prompt": 2}},
    "gradient checkpointing": {"options": {"gradient_checkpointing": True}},
    "a loss of its own": {"module": partial(sdft_module, kind=OwnLoss)},
    "everything that is measured": {
        "retention": {"pass_at": [1, 3], "selection_split": "validation"},
        "watch": {"every_n_steps": 1, "on_drop": "stop", "max_drop": 0.0},
    },
    "one model per task": {"data": {"from_base_each_task": True}},
    "rollouts drawn ahead": {"options": {"updates_per_generation": 3}},
    "a horizon, the likeliest tokens": {
        "options": {"horizon": 3, "divergence_top_k": 4, "rollouts_per_prompt": 2}
    },
    "whole logits, drawn ahead": {
        "module": partial(sdft_module, kind=OwnScore),
        "options": {"updates_per_generation": 2},
    },
    "filters": {"filters": {"checks": [Some()]}},
    "masked echoes": {"options": {"mask_echoes": 0.9, "skip_first_tokens": 0}},
    "masked echoes, whole logits": {
        "module": partial(sdft_module, kind=OwnScore),
        "options": {"mask_echoes": 0.9},
    },
    "a loss that is no number in one process": {"module": partial(sdft_module, kind=Breaking)},
    "a guard that acts": {
        "guard": {
            "length": always("lower_lr", patience=2),
            "truncated": always("freeze_teacher", patience=3),
            "repetition": always("reset_teacher", "skip_step", patience=4),
            "again": 2,
        },
    },
    "l2": {"options": lambda: {"penalty": L2ToStart(0.5)}},
    "ewc": {"options": lambda: {"penalty": EWC(5.0, examples=3)}},
    "sft": {"module": other(SFTModule)},
    "dft and replay": {"module": other(DFTModule), "data": {"mixtures": [PastReplay(0.5)]}},
    "cpt": {
        "module": other(CPTModule),
        "options": {"text": "prompt_and_demonstration", "max_text_tokens": 4},
    },
    "re-invoke": {
        "module": other(ReinvokeModule),
        "data": {"mixtures": [GeneralPrompts(0.25), Reinvoke(0.4)]},
    },
    "anchored replay": {
        "module": partial(sdft_module, kind=AnchorReplayModule),
        "data": {"mixtures": [PastReplay(0.3)]},
    },
    "stored soft targets": {
        "module": other(SoftTargetModule),
        "options": {"targets_per_token": 4, "answers_per_prompt": 2},
        "data": {"mixtures": [GeneralPrompts(0.25)]},
    },
    "a snapshot's soft targets": {
        "module": other(SoftTargetModule),
        "options": {"targets": "snapshot", "weight": 0.6},
        "data": {"mixtures": [GeneralPrompts(0.25)]},
    },
    "teacher samples": {
        "module": other(TeacherSampleModule),
        "options": {"loss": "soft", "samples_per_prompt": 2},
    },
    "few teacher samples": {  # a process may have none where another has some
        "module": other(TeacherSampleModule),
        "options": lambda: {"loss": "soft", "checks": [Some()]},
    },
}


REPLICATED: dict[str, Any] = {
    "adapters": {"options": lambda: {"lora": LoRA(2, 24.0)}},
    "adapters and micro-batches": {
        "options": lambda: {"lora": LoRA(2, 24.0), "micro_batch_tokens": 12}
    },
    "micro-batches": {"options": {"micro_batch_tokens": 12, "updates_per_generation": 2}},
}
"""What needs whole weights in every process."""


RESUMED: dict[str, Any] = {
    "options": {"optimizer": partial(torch.optim.SGD, lr=0.2, momentum=0.9)},
    "teacher": partial(EMATeacher, rate=0.1, every_n_steps=2),
}
"""A run that is broken off and goes on with another number of processes."""
ROUGH: dict[str, Any] = {
    "family": "gpt2",  # with dropout
    "options": {"optimizer": partial(AdamWBF16, lr=1e-2), "updates_per_generation": 2},
    "teacher": partial(EMATeacher, rate=0.5, storage="bfloat16"),
}
"""A run whose noise is another for each shard: reproducible, but not that of one process."""


ALL = CASES | REPLICATED | {"resumed": RESUMED, "rough": ROUGH}


def case_callbacks(folder: Path, every_step: bool) -> list[Callback]:
    """Checkpoints of every step, where they are wanted."""
    if not every_step:
        return []
    options = {"save_top_k": -1, "every_n_train_steps": 1, "save_on_train_epoch_end": False}
    return [ModelCheckpoint(folder / "steps", "{step}", **options)]


def run(
    name: str,
    models: Path,
    folder: Path,
    strategy: str,
    devices: int = 1,
    ckpt_path: str | None = None,
    every_step: bool = False,
    learning_rate: float | None = None,
    checkpoint: dict[str, Any] | None = None,
    at_signal: dict[str, int] | None = None,
    killed: dict[str, Any] | None = None,
) -> tuple[Trainer, StudentModule]:
    """Run a case below `folder`; what it measured is left in `kept-<rank>.json`."""
    for plot in ("plot_matrix", "plot_curves"):
        setattr(sdft.report, plot, lambda *args: None)
    sdft.report.save_figure = lambda figure, path: Path(path).touch()
    seed_everything(7, verbose=False)
    case, folder = ALL[name], folder / name
    folder.mkdir(parents=True, exist_ok=True)
    options = case.get("options", {})
    options = dict(options() if callable(options) else options)
    if learning_rate is not None:
        options["optimizer"] = partial(options["optimizer"], lr=learning_rate)
    if killed is not None:
        die(**killed)
    module = case.get("module", sdft_module)(models / case.get("family", "llama"), **options)
    kept = Kept()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=STRATEGIES[strategy](),
        logger=TensorBoardLogger(folder, default_hp_metric=False),
        callbacks=[
            case.get("teacher", partial(EMATeacher, rate=0.1))(),
            Guard(**case.get("guard", {})),
            StageWatch(**case.get("watch", {})),
            Filters(**case.get("filters", {})),
            Retention(**case.get("retention", {})),
            Samples(2),
            CostReport(),
            StageCheckpoint(**{"every_n_steps": 1} | (checkpoint or {})),
            ModelExport(),
            kept,
            *case_callbacks(folder, every_step),
            *([Signal(**at_signal)] if at_signal is not None else []),
        ],
        max_epochs=-1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        **{k: case[k] for k in ("accumulate_grad_batches", "gradient_clip_val") if k in case},
    )
    data = stream(**case.get("data", {}))
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    found = {
        "steps": kept.steps,
        "rows": kept.rows,
        "folder": str(trainer.log_dir),
        "sharded": is_sharded(module.model),
        "folder_here": str(run_folder(trainer)),
    }
    (folder / f"kept-{trainer.global_rank}.json").write_text(json.dumps(found))
    return trainer, module


def evaluate(
    models: Path, folder: Path, strategy: str, devices: int, ckpt_path: str
) -> dict[str, Any]:
    """What the entry points beside `fit` say of a checkpoint."""
    found: dict[str, Any] = {}
    for entry in ("validate", "test", "predict"):
        seed_everything(7, verbose=False)
        trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=STRATEGIES[strategy](),
            logger=TensorBoardLogger(folder, default_hp_metric=False),
            callbacks=[Predictions()],
            enable_progress_bar=False,
            enable_model_summary=False,
            inference_mode=False,
        )
        module = sdft_module(models / "llama")
        getattr(trainer, entry)(module, datamodule=stream(), ckpt_path=ckpt_path, weights_only=True)
        found[entry] = {key: float(value) for key, value in trainer.callback_metrics.items()}
        found["predictions"] = Path(trainer.log_dir or "") / "predictions.jsonl"
    found["predictions"] = found["predictions"].read_text()
    return found
