"""A resumed run is the uninterrupted run, bit for bit, wherever it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, save_model
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from sdft import ContinualDataModule, StudentModule
from sdft.callbacks import EMATeacher, Retention
from sdft.methods import SFTModule

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., tuple[Trainer, StudentModule]]

# Stages of 3 steps, 4 rows per batch of 6: every pass ends in a smaller batch.
CASES: dict[str, dict[str, Any]] = {
    "sdft": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "accumulation that does not divide": {"accumulate_grad_batches": 2, "data": {"epochs": 3}},
    "dropout": {"family": "gpt2"},
    "optimizer reset": {"data": {"reset_optimizer_between_tasks": True}},
    "sft": {"method": "sft"},
    "sft with dropout, accumulation and reset": {
        "method": "sft",
        "family": "gpt2",
        "accumulate_grad_batches": 2,
        "data": {"reset_optimizer_between_tasks": True},
    },
    "clipping and a slow teacher": {"gradient_clip_val": 0.1, "every_n_steps": 2},
    "bf16 weights": {"precision": "bf16-true"},
}


def build_module(folder: Path, method: str) -> StudentModule:
    if method == "sdft":
        return make_module(folder)
    return SFTModule(
        model_name=str(folder),
        max_new_tokens=6,
        teacher_template="{prompt} shown {demonstration} now",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )


class Runs:
    """One configuration, run whole or from a checkpoint, every step of it on disk."""

    def __init__(self, fit: Fit, tmp_path: Path, options: dict[str, Any]) -> None:
        options = dict(options)
        self.fit = fit
        self.steps = tmp_path / "steps"
        self.method = options.pop("method", "sdft")
        self.every_n_steps = options.pop("every_n_steps", 1)
        data = options.pop("data", {})
        self.data = {"steps": None, **data} if "epochs" in data else data
        self.options = options
        self.folder = save_model(tmp_path / "model", family=options.pop("family", "llama"))

    def __call__(self, root: str, ckpt_path: Path | None = None) -> tuple[Trainer, StudentModule]:
        every_step = ModelCheckpoint(
            self.steps, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False
        )
        return self.fit(
            root,
            build_module(self.folder, self.method),
            make_data(**self.data),
            EMATeacher(rate=0.1, every_n_steps=self.every_n_steps),
            [] if ckpt_path else [every_step],
            ckpt_path,
            **self.options,
        )

    def step(self, number: int) -> Path:
        return self.steps / f"step={number}.ckpt"


def tensors(tree: Any) -> dict[str, torch.Tensor]:
    """All tensors and numbers of a nested state, by their path."""
    if isinstance(tree, torch.Tensor | float | int):
        return {"": torch.as_tensor(tree)}
    if not isinstance(tree, dict | list | tuple):
        return {}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {f"/{key}{path}": leaf for key, value in items for path, leaf in tensors(value).items()}


def outcome(trainer: Trainer, module: StudentModule) -> dict[str, torch.Tensor]:
    """Student, teacher, optimizer, schedule, retention and place, to be compared bit for bit."""
    retention = next(c for c in trainer.callbacks if isinstance(c, Retention))
    return tensors(
        {
            "weights": dict(module.state_dict()),
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "retention": retention.state_dict(),
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
        }
    )


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def report(trainer: Trainer) -> Any:
    return json.loads((Path(trainer.log_dir) / "retention.json").read_text())


@pytest.fixture(params=CASES)
def runs(request: pytest.FixtureRequest, fit: Fit, tmp_path: Path) -> Runs:
    return Runs(fit, tmp_path, CASES[request.param])


def test_resuming_from_any_step_and_any_boundary_changes_nothing(runs: Runs) -> None:
    trainer, module = runs("whole")
    expected, retention = outcome(trainer, module), report(trainer)
    steps, stage = trainer.global_step, trainer.global_step // 2
    assert steps == sum(trainer.datamodule.stage_steps())
    checkpoints = Path(trainer.log_dir) / "checkpoints"
    places = {
        "first step": runs.step(1),
        "middle of a stage": runs.step(stage - 1),
        "last batch of a stage": runs.step(stage),
        "boundary": checkpoints / "stage-1-first.ckpt",
        "first step of the second stage": runs.step(stage + 1),
        "last batch of the run": runs.step(steps),
        "end of the run": checkpoints / "last.ckpt",
    }
    for place, path in places.items():
        resumed, student = runs(f"from {place}", path)
        assert_same(outcome(resumed, student), expected), place
        if place != "end of the run":
            assert report(resumed) == retention, place


def test_training_moves_what_the_comparison_compares(fit: Fit, tmp_path: Path) -> None:
    """The comparison above would not notice a run that stands still."""
    runs = Runs(fit, tmp_path, {})
    trainer, module = runs("whole")
    found = outcome(trainer, module)
    before = tensors(torch.load(runs.step(1), weights_only=True)["state_dict"])
    for name, value in before.items():
        assert not torch.equal(found[f"/weights{name}"], value), name
    assert any("teacher" in name for name in before)
