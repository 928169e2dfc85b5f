"""A resumed run is the uninterrupted run, bit for bit, wherever it stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_method, make_module, make_task, run_fit, save_model
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from sdft import ContinualDataModule, Example, StudentModule
from sdft.callbacks import EMATeacher, Retention
from sdft.horizon import Horizon
from sdft.lora import LoRA
from sdft.methods import (
    AnchorReplayModule,
    CPTModule,
    DFTModule,
    ReinvokeModule,
    SFTModule,
    SoftTargetModule,
    TeacherSampleModule,
)
from sdft.mixtures import GeneralPrompts, Joint, PastReplay, Reinvoke
from sdft.penalties import EWC, L2ToStart
from sdft.scorers import Scorer

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., tuple[Trainer, StudentModule]]


class Overlap(Scorer):
    """The share of the response that stands in the answer: a score that moves with every token."""

    def __call__(self, response: str, example: Example) -> float:
        words = response.split()
        return sum(word in example.answer.split() for word in words) / max(len(words), 1)


# Stages of 3 steps, batches of 4 from 6 rows: every pass ends in a smaller batch.
CASES: dict[str, dict[str, Any]] = {
    "sdft": {},
    "accumulation that does not divide": {"accumulate_grad_batches": 2, "data": {"epochs": 3}},
    "dropout": {"family": "gpt2"},
    "clipping, optimizer reset and a slow teacher": {
        "gradient_clip_val": 0.1,
        "every_n_steps": 2,
        "data": {"reset_optimizer_between_tasks": True},
    },
    "sft with dropout, accumulation and optimizer reset": {
        "method": "sft",
        "family": "gpt2",
        "accumulate_grad_batches": 2,
        "data": {"reset_optimizer_between_tasks": True},
    },
    "bf16 weights": {"precision": "bf16-true"},
    "rollouts drawn ahead": {"module": lambda: {"updates_per_generation": 3}},
    "rollouts drawn ahead, accumulation, replay, dropout and a ramp": {
        "family": "gpt2",
        "accumulate_grad_batches": 2,
        "module": lambda: {
            "updates_per_generation": 2,
            "rollouts_per_prompt": 2,
            "horizon": Horizon(2, 5, 2),
            "micro_batch_tokens": 40,
            "divergence_top_k": 4,
        },
        "data": {"mixtures": [PastReplay(0.5)]},
    },
    "dft and replay from a memory": {
        "method": "dft",
        "data": {"mixtures": [PastReplay(0.5, memory=2)]},
    },
    "cpt on all tasks at once": {
        "method": "cpt",
        "module": lambda: {"text": "prompt_and_demonstration", "max_text_tokens": 4},
        "data": {"mixtures": [Joint()]},
    },
    "re-invoke with replay and accumulation": {
        "method": "reinvoke",
        "accumulate_grad_batches": 2,
        "data": {"mixtures": [PastReplay(0.5), GeneralPrompts(0.25), Reinvoke(0.4)]},
    },
    "replay held to an anchor, bf16 weights": {
        "method": "anchor_replay",
        "precision": "bf16-true",
        "data": {"mixtures": [PastReplay(0.5)]},
    },
    "l2, bf16 weights": {
        "method": "sft",
        "precision": "bf16-true",
        "module": lambda: {"penalty": L2ToStart(0.5)},
    },
    "ewc with dropout and accumulation": {
        "method": "sft",
        "family": "gpt2",
        "accumulate_grad_batches": 2,
        "module": lambda: {"penalty": EWC(5.0, examples=3)},
    },
    "ewc, bf16 weights": {
        "precision": "bf16-true",
        "module": lambda: {"penalty": EWC(5.0, examples=3, gamma=0.5)},
    },
    "stored soft targets with dropout": {
        "method": "soft_targets",
        "family": "gpt2",
        "module": lambda: {"targets_per_token": 4, "answers_per_prompt": 2},
        "data": {"mixtures": [GeneralPrompts(0.5)], "general": [make_task("general", train=5)]},
    },
    "a snapshot's soft targets": {
        "method": "soft_targets",
        "module": lambda: {"targets": "snapshot", "weight": 0.6, "temperature": 0.8},
        "data": {"mixtures": [GeneralPrompts(0.5)], "general": [make_task("general", train=5)]},
    },
    "teacher samples": {
        "method": "teacher_samples",
        "accumulate_grad_batches": 2,
        "module": lambda: {"loss": "soft", "samples_per_prompt": 2},
    },
    "adapters with dropout": {
        "module": lambda: {"lora": LoRA(2, 4.0, dropout=0.2), "micro_batch_tokens": 30},
        "accumulate_grad_batches": 2,
    },
    "adapters, one model per task": {
        "module": lambda: {"lora": LoRA(2, 4.0)},
        "data": {"from_base_each_task": True},
    },
    "one model per task": {"data": {"from_base_each_task": True}},
    "everything that is measured": {
        "retention": {"pass_at": [1, 3], "pass_samples": 5, "selection_split": "validation"}
    },
}

EVERYWHERE = ("sdft", "rollouts drawn ahead", "one model per task", "everything that is measured")

METHODS: dict[str, type[StudentModule]] = {
    "sft": SFTModule,
    "dft": DFTModule,
    "cpt": CPTModule,
    "reinvoke": ReinvokeModule,
    "anchor_replay": AnchorReplayModule,
    "soft_targets": SoftTargetModule,
    "teacher_samples": TeacherSampleModule,
}


def build_module(folder: Path, method: str, **options: Any) -> StudentModule:
    if method == "sdft":
        return make_module(folder, **options)
    return make_method(METHODS[method], folder, **options)


def stream(**options: Any) -> ContinualDataModule:
    tasks = [make_task(name, scorer=Overlap()) for name in ("first", "second", "prior")]
    settings = {"batch_size": 4, "steps": 3, "general": [make_task("any", train=5)]} | options
    return ContinualDataModule(tasks[:2], suites=tasks[2:], **settings)


class Runs:
    """One configuration, run whole or from a checkpoint, every step of it on disk."""

    def __init__(self, fit: Fit, tmp_path: Path, options: dict[str, Any]) -> None:
        options = dict(options)
        self.fit = fit
        self.steps = tmp_path / "steps"
        self.method = options.pop("method", "sdft")
        self.module = options.pop("module", dict)
        self.every_n_steps = options.pop("every_n_steps", 1)
        self.retention = options.pop("retention", {})
        data = options.pop("data", {})
        self.data = {"steps": None, **data} if "epochs" in data else data
        self.options = options
        self.folder = save_model(tmp_path / "model", family=options.pop("family", "llama"))

    def __call__(
        self, root: str, ckpt_path: Path | None = None, **options: Any
    ) -> tuple[Trainer, StudentModule]:
        every_step = ModelCheckpoint(
            self.steps,
            "{step}",
            save_top_k=-1,
            every_n_train_steps=1,
            save_on_train_epoch_end=False,
        )
        return self.fit(
            root,
            build_module(self.folder, self.method, **self.module()),
            stream(**self.data),
            EMATeacher(rate=0.1, every_n_steps=self.every_n_steps),
            Retention(**self.retention),
            callbacks=[] if ckpt_path else [every_step],
            ckpt_path=ckpt_path,
            **self.options | options,
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


def places(runs: Runs, trainer: Trainer) -> dict[str, Path]:
    """Checkpoints of a whole run of two stages, from its start to its end."""
    steps, stage = trainer.global_step, trainer.global_step // 2
    checkpoints = Path(trainer.log_dir) / "checkpoints"
    return {
        "the middle of a stage": runs.step(stage - 1),
        "the last batch of a stage": runs.step(stage),
        "a boundary": checkpoints / "stage-1-first.ckpt",
        "the first step after a boundary": runs.step(stage + 1),
        "the first step": runs.step(1),
        "the last batch of the run": runs.step(steps),
        "the end of the run": checkpoints / "last.ckpt",
    }


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(case: str, fit: Fit, tmp_path: Path) -> None:
    runs = Runs(fit, tmp_path, CASES[case])
    trainer, module = runs("whole")
    expected, retention = outcome(trainer, module), report(trainer)
    assert trainer.global_step == sum(trainer.datamodule.schedule_steps())
    found = list(places(runs, trainer).items())
    for place, path in found if case in EVERYWHERE else found[:4]:
        resumed, student = runs(f"from {place}", path)
        assert_same(outcome(resumed, student), expected)
        assert report(resumed) == retention


@pytest.mark.parametrize("case", EVERYWHERE)
def test_a_stage_that_was_evaluated_late_has_its_files(case: str, fit: Fit, tmp_path: Path) -> None:
    """The run ended between a stage's training and its evaluation: nothing of it is missing."""
    runs = Runs(fit, tmp_path, CASES[case])
    trainer, module = runs("whole")
    expected = outcome(trainer, module)
    steps = trainer.global_step
    for number, name in ((steps // 2, "stage-1-first"), (steps, "stage-2-second")):
        resumed, _ = runs(f"from {number}", runs.step(number))
        folder = Path(resumed.log_dir)
        made = (folder / "samples.jsonl").read_text()
        assert (Path(trainer.log_dir) / "samples.jsonl").read_text().endswith(made)
        late = folder / "checkpoints" / f"{name}.ckpt"
        again, student = runs(f"from {name}", late)
        assert_same(outcome(again, student), expected)
        assert report(again) == report(trainer)
        if again.global_step > number:  # and where that run goes on from
            third = runs(
                f"third, {number}", Path(again.log_dir) / f"checkpoints/step-{steps - 1}.ckpt"
            )
            assert_same(outcome(*third), expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERYWHERE)
def test_a_run_that_is_resumed_twice(case: str, fit: Fit, tmp_path: Path) -> None:
    """From every checkpoint of every run that was resumed from a checkpoint."""
    runs = Runs(fit, tmp_path, CASES[case])
    trainer, module = runs("whole")
    expected, retention = outcome(trainer, module), report(trainer)
    for start in range(1, trainer.global_step + 1):
        resumed, _ = runs(f"from {start}", runs.step(start))
        for path in (Path(resumed.log_dir) / "checkpoints").glob("st*.ckpt"):
            again, student = runs(f"from {start} and {path.stem}", path)
            assert_same(outcome(again, student), expected)
            assert report(again) == retention


def test_what_is_compared_moves(fit: Fit, tmp_path: Path) -> None:
    """Else the comparison would not notice a run that stands still."""
    runs = Runs(fit, tmp_path, CASES["sdft"])
    trainer, module = runs("whole")
    found = outcome(trainer, module)
    before = tensors(torch.load(runs.step(1), weights_only=True)["state_dict"])
    assert {name.split(".")[0] for name in before} == {"/student", "/teacher"}
    for name, value in before.items():
        assert not torch.equal(found[f"/weights{name}"], value), name
    rows = [[cell["score"] for cell in row] for row in report(trainer)["matrix"]]
    assert len({tuple(row) for row in rows}) == 3, "three rows, all different"


def test_a_seed_matters(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(fit, tmp_path, CASES["sdft"])
    one, again = outcome(*runs("one")), outcome(*runs("again"))
    assert_same(again, one)
    monkeypatch.setattr("conftest.seed_everything", lambda *args, **options: seed_everything(8))
    other = outcome(*runs("other"))
    assert any(not torch.equal(other[key], one[key]) for key in one)


# ---------------------------------------------------------------- killed


def killed(runs: Runs, root: Path) -> Path:
    """Run in a process of its own, kill it at a random moment; returns its run's folder."""
    folder = root / "lightning_logs" / "version_0"
    child = os.fork()
    if child == 0:
        runs(root.name)
        os._exit(0)
    deadline = time.monotonic() + 60
    while not (folder / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.4 * random.random())
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it had ended before it was killed"
    return folder


def test_a_killed_run_goes_on_as_if_nothing_had_happened(fit: Fit, tmp_path: Path) -> None:
    runs = Runs(fit, tmp_path, {"data": {"steps": 10}})
    trainer, module = runs("whole")
    expected, retention = outcome(trainer, module), report(trainer)
    for number in range(2):
        folder = killed(runs, tmp_path / f"killed-{number}")
        rows = json.loads((folder / "retention.json").read_text())["matrix"]
        assert rows == retention["matrix"][: len(rows)]
        resumed = runs(f"resumed-{number}", folder / "checkpoints" / "last.ckpt")
        assert_same(outcome(*resumed), expected)
        assert report(resumed[0]) == retention


# ---------------------------------------------------------------- not this run's checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[Runs, Path]:
    """A run's step checkpoint, and what makes more runs."""
    folder = tmp_path_factory.mktemp("saved")
    runs = Runs(partial(run_fit, folder, model_dir), folder, CASES["sdft"])
    runs("whole", max_epochs=1)
    return runs, runs.step(2)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt2", {}), ("llama", {"hidden_size": 16}), ("llama", {"num_hidden_layers": 1})],
)
def test_another_model_is_refused(
    saved: tuple[Runs, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    changes: dict[str, int],
) -> None:
    runs, path = saved
    whole, other = runs.folder, save_model(tmp_path / "other", family=family, **changes)
    monkeypatch.setattr(runs, "folder", other)
    with pytest.raises(ValueError, match="belongs to another model") as error:
        runs("resumed", path)
    assert str(whole) in str(error.value)
    assert str(other) in str(error.value)


def test_another_method_is_refused_for_training_only(
    saved: tuple[Runs, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, path = saved
    monkeypatch.setattr(runs, "method", "sft")
    with pytest.raises(ValueError, match=r"method 'sdft'.*'sft'"):
        runs("resumed", path)
    trainer = Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
    module = build_module(runs.folder, "sft")
    trainer.test(module, datamodule=stream(), ckpt_path=path, weights_only=True)
    expected = torch.load(path, weights_only=True)["state_dict"]
    state = module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.parametrize("names", [("second", "first"), ("other", "second")])
def test_another_sequence_is_refused(
    saved: tuple[Runs, Path], fit: Fit, names: tuple[str, ...]
) -> None:
    runs, path = saved
    with pytest.raises(ValueError, match="task sequence") as error:
        fit("other", make_module(runs.folder), make_data(names), ckpt_path=path)
    assert "['first', 'second']" in str(error.value)
    assert str(list(names)) in str(error.value)


def test_a_checkpoint_of_something_else_is_refused(
    saved: tuple[Runs, Path], tmp_path: Path
) -> None:
    runs, path = saved
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["sdft"]
    torch.save(checkpoint, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="not written by sdft"):
        runs("resumed", tmp_path / "foreign.ckpt")
