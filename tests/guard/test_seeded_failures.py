"""Known failures on the embedded world are found in time, and a healthy run is left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from sdft import ContinualDataModule, SDFTModule
from sdft.callbacks import EMATeacher, Guard
from sdft.guard import GuardStop
from sdft.guard.signals import RULES
from sdft.world import TEACHER_TEMPLATE, WorldSkill

FIRST = 30
"""Optimizer steps within which a failure has to be found."""
GROWING = "{prompt} example {demonstration}"
"""Without the words that end the demonstration, the teacher goes on and on."""
STOP = {
    name: replace(RULES[name], actions=["stop_and_save"])
    for name in ("divergence", "length", "truncated", "gradient")
}


def train(
    folder: Path,
    lr: float = 5e-5,
    kind: Literal["ema", "live"] = "ema",
    template: str = TEACHER_TEMPLATE,
    tokens: int = 16,
    seed: int = 0,
) -> None:
    """The first steps of a run as `configs/seq_skills.yaml` has it, with the default rules.

    Raises:
        GuardStop: At the first alarm.
    """
    seed_everything(seed, verbose=False)
    module = SDFTModule(
        model_name="sdft:world",
        max_new_tokens=tokens,
        teacher_template=template,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=FIRST,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        logger=False,
        default_root_dir=folder,
        callbacks=[EMATeacher(kind, rate=0.02), Guard(**STOP)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    skill = WorldSkill("garden", validation_size=0)
    trainer.fit(module, datamodule=ContinualDataModule([skill], batch_size=32, steps=40))
    assert trainer.global_step == FIRST


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_healthy_run_raises_no_alarm(tmp_path: Path, seed: int) -> None:
    train(tmp_path, seed=seed)
    assert not (tmp_path / "guard.jsonl").exists()


@pytest.mark.slow
def test_a_rate_a_hundred_times_too_high(tmp_path: Path) -> None:
    with pytest.raises(GuardStop, match=r"gradient|divergence"):
        train(tmp_path, lr=5e-3)


@pytest.mark.slow
def test_a_live_teacher_that_diverges(tmp_path: Path) -> None:
    """Long before the answers collapse, in the next stage."""
    with pytest.raises(GuardStop, match="divergence"):
        train(tmp_path, lr=1e-3, kind="live")


@pytest.mark.slow
def test_a_template_that_makes_answers_grow(tmp_path: Path) -> None:
    with pytest.raises(GuardStop, match="length"):
        train(tmp_path, template=GROWING, tokens=48)
