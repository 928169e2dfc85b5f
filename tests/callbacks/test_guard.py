"""The guard keeps what is broken away from the weights, and says what it did and why."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_method, make_module
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_resume import assert_same, outcome, tensors
from torch import Tensor

from sdft import SDFTModule, StudentModule
from sdft.batch import Batch
from sdft.callbacks import EMATeacher, Guard
from sdft.guard import GuardStop, Rule
from sdft.lora import LoRA
from sdft.methods import SFTModule
from sdft.weights import GOOD_TEACHER

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., tuple[Trainer, StudentModule]]

ALWAYS = {"deviations": None, "above": 0.0, "patience": 1}
"""Completions are always longer than nothing."""


class Breaking(SDFTModule):
    """Its loss is no number in the batches that `bad` names, counted over the run."""

    bad: tuple[int, ...] = ()
    batches = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.batches += 1
        return loss * math.nan if self.batches - 1 in self.bad else loss


class Watched(Callback):
    """Weights, moments and teacher after every optimizer step, the learning rates before it."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if len(self.states) <= trainer.global_step:
            self._keep(trainer, pl_module)

    def _keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = trainer.optimizers[0].state_dict()["state"]
        found = tensors({"weights": dict(pl_module.state_dict()), "optimizer": state})
        self.states.append({name: value.clone() for name, value in found.items()})

    @property
    def moved(self) -> list[bool]:
        """Whether a step has changed anything at all."""
        pairs = zip(self.states, self.states[1:], strict=False)
        return [
            one.keys() != other.keys() or any(not torch.equal(one[k], other[k]) for k in one)
            for one, other in pairs
        ]


def breaking(folder: Path, bad: tuple[int, ...], **options: Any) -> Breaking:
    module = make_method(Breaking, folder, **{"skip_first_tokens": 1} | options)
    module.bad = bad
    return module


def diary(trainer: Trainer) -> list[dict[str, Any]]:
    file = Path(str(trainer.log_dir)) / "guard.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize(
    ("options", "run", "bad", "skipped"),
    [
        ({}, {}, (1, 4), (1, 4)),
        ({}, {"gradient_clip_val": 1.0}, (0,), (0,)),
        ({"micro_batch_tokens": 20}, {}, (1,), (1,)),
        ({"updates_per_generation": 3}, {}, (1,), (1,)),
        ({"updates_per_generation": 3, "stale": "recompute"}, {}, (1,), (1,)),
        # Batches 0–1 and 2 of each stage's three make a step: the last one is a stage's rest.
        ({}, {"accumulate_grad_batches": 2, "data": {"epochs": 2, "steps": None}}, (0, 5), (0, 2)),
        ({"lora": LoRA(2, 4.0)}, {}, (2,), (2,)),
        ({}, {"precision": "bf16-mixed"}, (1,), (1,)),
    ],
)
def test_they_never_reach_the_weights(
    options: dict[str, Any],
    run: dict[str, Any],
    bad: tuple[int, ...],
    skipped: tuple[int, ...],
    fit: Fit,
    model_dir: Path,
) -> None:
    watched = Watched()
    trainer, _ = fit(
        module=breaking(model_dir, bad, **options),
        data=make_data(**run.get("data", {})),
        callbacks=[Guard(), watched],
        **{key: value for key, value in run.items() if key != "data"},
    )
    steps = trainer.global_step
    assert steps == sum(trainer.datamodule.schedule_steps())  # type: ignore[attr-defined]
    assert watched.moved == [step not in skipped for step in range(steps)]
    assert all(value.isfinite().all() for value in watched.states[-1].values())
    records = diary(trainer)
    assert [record["step"] for record in records] == [step + 1 for step in skipped]
    for record in records:
        assert record["skipped"]
        assert record["signals"]["gradient"] == "nan"
        assert record["alarms"][0]["signal"] == "nonfinite"
        assert record["alarms"][0]["actions"] == ["skip_step"]


def test_without_a_guard_they_do(fit: Fit, model_dir: Path) -> None:
    module = breaking(model_dir, (1,))
    with pytest.raises(ValueError, match="its weights have diverged"):
        fit(module=module)
    assert all(value.isnan().any() for value in module.model.state_dict().values())


def test_the_schedule_goes_on(fit: Fit, model_dir: Path) -> None:
    plain, broken = Watched(), Watched()
    fit("plain", callbacks=[Guard(), plain])
    fit("broken", module=breaking(model_dir, (1, 2)), callbacks=[Guard(), broken])
    assert broken.rates == plain.rates
    assert len(broken.states) == len(plain.states)


def test_what_follows_a_skipped_step_is_as_if_its_batch_had_not_been(
    fit: Fit, model_dir: Path
) -> None:
    """The moments know nothing of the skipped step: the next one is an optimizer's first."""
    broken = Watched()
    fit(module=breaking(model_dir, (0, 1)), callbacks=[Guard(), broken])
    counts = {k: v for k, v in broken.states[3].items() if k.endswith("/step")}
    assert counts
    assert all(float(value) == 1.0 for value in counts.values())


def test_many_in_a_row_stop_the_run(fit: Fit, model_dir: Path, tmp_path: Path) -> None:
    module = breaking(model_dir, tuple(range(100)))
    with pytest.raises(GuardStop, match="stopped at step 3: 3 steps in a row were skipped") as stop:
        fit(module=module, data=make_data(steps=10), callbacks=[Guard(max_skipped=3)])
    assert stop.value.checkpoint is not None
    assert stop.value.checkpoint.name == "guard-step-3.ckpt"
    state = torch.load(stop.value.checkpoint, weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_a_penaltys_gradient_is_looked_at_too(fit: Fit, model_dir: Path) -> None:
    class Poisoned(SDFTModule):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step == 1:
                next(iter(self.model.parameters())).grad.fill_(math.inf)  # type: ignore[union-attr]
            super().on_before_optimizer_step(optimizer)

    watched = Watched()
    fit(module=make_method(Poisoned, model_dir), callbacks=[Guard(), watched])
    assert watched.moved == [True, False, True, True, True, True]


def test_a_loss_scaler_does_its_own_and_the_teacher_waits(
    fit: Fit, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdft.callbacks.guard._scales", lambda trainer: True)
    watched = Watched()
    trainer, _ = fit(module=breaking(model_dir, (1,)), callbacks=[Guard(), watched])
    assert watched.moved == [True, False, True, True, True, True]
    assert [record["alarms"] for record in diary(trainer)] == [[]]


# ---------------------------------------------------------------- actions


def test_a_healthy_run_is_left_alone(fit: Fit) -> None:
    guarded, plain = fit("guarded", callbacks=[Guard()]), fit("plain")
    assert_same(outcome(*guarded), outcome(*plain))


def test_warn_only_says_so(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, module = fit("warned", callbacks=[Guard(length=Rule(**ALWAYS), again=2)])
    assert_same(outcome(trainer, module), outcome(*fit("plain")))
    assert [record["step"] for record in diary(trainer)] == [1, 3, 4, 6]  # stages of three steps
    record = diary(trainer)[0]
    assert (record["stage"], record["task"], record["skipped"]) == (0, "first", False)
    assert record["alarms"][0]["reason"] == "above 0 (a limit)"
    assert set(record["signals"]) >= {"divergence", "length", "truncated", "repetition", "gradient"}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("guard")]
    assert said[0].startswith("guard: step 1: length ")
    assert said[0].endswith("is above 0 (a limit): warn")


def test_what_is_measured_now_and_then(fit: Fit) -> None:
    rule = Rule(**ALWAYS | {"above": -1.0})
    steps = []
    for every in (0, 2):
        guard = Guard(entropy=rule, kl_base=rule, again=1, measure_every_n_steps=every)
        trainer, _ = fit(f"every {every}", callbacks=[guard], log_every_n_steps=3)
        found = [
            (record["step"], alarm["signal"])
            for record in diary(trainer)
            for alarm in record["alarms"]
        ]
        steps.append([step for step, signal in found if signal == "kl_base"])
        assert [step for step, signal in found if signal == "entropy"] == steps[-1]
    assert steps == [[3, 6], [2, 3, 4, 6]]


def test_skipping_lasts_as_long_as_the_alarm(fit: Fit) -> None:
    watched = Watched()
    rule = Rule(**ALWAYS | {"patience": 2}, actions=["skip_step"])
    trainer, _ = fit(callbacks=[Guard(length=rule), watched])
    assert watched.moved == [True, False, False, True, False, False]
    assert [record["skipped"] for record in diary(trainer)] == [True] * 4
    assert [len(record["alarms"]) for record in diary(trainer)] == [1, 0, 1, 0]


def test_lower_lr(fit: Fit) -> None:
    plain, lowered = Watched(), Watched()
    fit("plain", callbacks=[plain])
    rule = Rule(**ALWAYS, actions=["lower_lr"])
    guard = Guard(length=rule, again=2, lr_factor=0.5, min_lr_factor=0.2)
    trainer, _ = fit("lowered", callbacks=[lowered, guard])
    # The steps 1 and 3 of each stage; the rate is read before the step that lowers it.
    factors = [1, 0.5, 0.5, 0.25, 0.2, 0.2]
    expected = [rate * factor for rate, factor in zip(plain.rates, factors, strict=True)]
    assert lowered.rates == pytest.approx(expected)
    assert [record["lr_factor"] for record in diary(trainer)] == [0.5, 0.25, 0.2, 0.2]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2),
                torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
            ],
            milestones=[2],
        ),
    ],
)
def test_lower_lr_under_other_schedules(
    scheduler: Callable[..., Any], fit: Fit, model_dir: Path
) -> None:
    rule = Rule(**ALWAYS, actions=["lower_lr"])
    plain, lowered = Watched(), Watched()
    for root, watched, callbacks in (
        ("plain", plain, []),
        ("lowered", lowered, [Guard(length=rule, again=100, warmup=1)]),
    ):
        module = make_module(model_dir, scheduler=scheduler)
        fit(root, module, make_data(("only",), steps=6), callbacks=[watched, *callbacks])
    expected = [plain.rates[0], *(0.5 * rate for rate in plain.rates[1:])]
    assert lowered.rates == pytest.approx(expected)


def teacher_moved(watched: Watched) -> list[bool]:
    names = [name for name in watched.states[0] if name.startswith("/weights/teacher.")]
    assert names
    pairs = zip(watched.states, watched.states[1:], strict=False)
    return [any(not torch.equal(one[n], other[n]) for n in names) for one, other in pairs]


def test_freeze_teacher_for_the_rest_of_the_stage(fit: Fit) -> None:
    watched = Watched()
    rule = Rule(**ALWAYS | {"patience": 2}, actions=["freeze_teacher"])
    trainer, _ = fit(callbacks=[Guard(length=rule), watched])
    assert teacher_moved(watched) == [True, False, False] * 2
    assert watched.moved == [True] * 6, "the student goes on"
    assert diary(trainer)[0]["teacher_frozen"]


class Marked(SDFTModule):
    """Logs a completion length of 1000 in the steps that `bad` names."""

    bad: tuple[int, ...] = ()

    def log_means(self, values: Any, count: Any, **options: Any) -> Any:
        if self.global_step in self.bad and "train/completion_length" in values:
            values = {**values, "train/completion_length": 1000.0}
        return super().log_means(values, count, **options)


def marked(folder: Path, *bad: int, **options: Any) -> Marked:
    module = make_method(Marked, folder, **{"skip_first_tokens": 1} | options)
    module.bad = bad
    return module


MARKED = {"deviations": None, "above": 999.0, "patience": 1}


@pytest.mark.parametrize("options", [{}, {"lora": LoRA(2, 4.0)}])
def test_reset_teacher_to_the_last_good_stage(
    options: dict[str, Any], fit: Fit, model_dir: Path
) -> None:
    watched = Watched()
    rule = Rule(**MARKED, actions=["reset_teacher", "skip_step"])
    # Good, alarmed, reset in the third stage: to the end of the first.
    fit(
        module=marked(model_dir, 4, 7, **options),
        data=make_data(("one", "two", "three")),
        callbacks=[Guard(length=rule), watched],
    )
    states = [
        {k: v for k, v in state.items() if k.startswith("/weights/teacher.")}
        for state in watched.states
    ]
    kept = ["/weights/" + GOOD_TEACHER + k.removeprefix("/weights/teacher") for k in states[0]]
    assert_same(states[5], states[3])  # the fifth step is an alarm in the second stage
    assert_same(states[8], states[3])  # and the eighth one in the third
    assert any(not torch.equal(states[7][k], states[3][k]) for k in states[3])
    assert any(not torch.equal(states[9][k], states[3][k]) for k in states[3]), "it moves on"
    assert all(name in watched.states[0] for name in kept)


def test_reset_teacher_in_the_first_stage_is_to_the_base(fit: Fit, model_dir: Path) -> None:
    watched = Watched()
    rule = Rule(**MARKED, actions=["reset_teacher", "freeze_teacher"])
    fit(module=marked(model_dir, 2), callbacks=[Guard(length=rule), watched])
    names = [k for k in watched.states[0] if k.startswith("/weights/teacher.")]
    assert all(torch.equal(watched.states[3][k], watched.states[0][k]) for k in names)
    assert any(not torch.equal(watched.states[2][k], watched.states[0][k]) for k in names)


def test_stop_and_save(fit: Fit, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = Rule(**MARKED, actions=["stop_and_save"])
    watched = Watched()
    guards = [Guard(length=rule), watched]
    with pytest.raises(GuardStop, match=r"stopped at step 5: length 1000 is above 999") as stop:
        fit("stopped", module=marked(model_dir, 4), callbacks=guards)
    assert stop.value.checkpoint is not None
    last = stop.value.checkpoint.with_name("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 4
    saved = torch.load(stop.value.checkpoint, weights_only=True)
    assert saved["global_step"] == 5
    assert_same(
        tensors({"weights": saved["state_dict"]}),
        {k: v for k, v in watched.states[4].items() if k.startswith("/weights")},
    )
    trainer, _ = fit("on", marked(model_dir), ckpt_path=stop.value.checkpoint, callbacks=guards[:1])
    assert trainer.global_step == 6


def test_other_methods_are_watched(fit: Fit, model_dir: Path) -> None:
    guard = Guard(divergence=Rule(**ALWAYS, actions=["lower_lr"]))
    trainer, _ = fit(module=make_method(SFTModule, model_dir), callbacks=[guard])
    assert diary(trainer)[0]["alarms"][0]["signal"] == "divergence"
    assert set(diary(trainer)[0]["signals"]) >= {"divergence", "length", "gradient", "kl_base"}


def test_a_guard_that_is_off_does_nothing(fit: Fit, model_dir: Path) -> None:
    guard = Guard(enabled=False, length=Rule(**ALWAYS, actions=["skip_step"]))
    trainer, module = fit("off", callbacks=[guard])
    assert_same(outcome(trainer, module), outcome(*fit("plain")))
    assert diary(trainer) == []


# ---------------------------------------------------------------- resume

ACTIVE: dict[str, Any] = {
    "length": Rule(**ALWAYS | {"patience": 2}, actions=["lower_lr"]),
    "truncated": Rule(**ALWAYS | {"above": -1.0, "patience": 3}, actions=["freeze_teacher"]),
    "repetition": Rule(**ALWAYS | {"above": -1.0, "patience": 4}, actions=["reset_teacher"]),
    "gradient": Rule(deviations=1.0, side="both", patience=1, actions=["skip_step"]),
    "window": 4,
    "warmup": 2,
    "reference": 2,
    "again": 2,
    "max_skipped": 100,
}


@pytest.mark.parametrize(
    ("options", "run"),
    [
        ({}, {}),
        ({"updates_per_generation": 2}, {"accumulate_grad_batches": 2}),
        ({"lora": LoRA(2, 4.0)}, {}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    options: dict[str, Any], run: dict[str, Any], fit: Fit, model_dir: Path, tmp_path: Path
) -> None:
    every_step = ModelCheckpoint(tmp_path / "steps", "{step}", save_top_k=-1, every_n_train_steps=1)

    def once(root: str, *callbacks: Callback, **more: Any) -> tuple[Any, Any]:
        guard = Guard(**ACTIVE)
        module = make_module(model_dir, **options)
        trainer, student = fit(
            root, module, make_data(steps=6), callbacks=[guard, *callbacks], **run, **more
        )
        found = outcome(trainer, student) | tensors({"guard": guard.state_dict()})
        return found, diary(trainer)

    expected, told = once("whole", every_step)
    assert any(record["skipped"] for record in told)
    assert any(not record["skipped"] for record in told)
    actions = {a for record in told for alarm in record["alarms"] for a in alarm["actions"]}
    assert actions == {"lower_lr", "freeze_teacher", "reset_teacher", "skip_step"}
    for step in (1, 3, 5, 6, 7, 11):
        found, rest = once(f"from {step}", ckpt_path=tmp_path / "steps" / f"step={step}.ckpt")
        assert_same(found, expected)
        assert rest == [record for record in told if record["step"] > step]


def test_a_checkpoint_of_a_run_without_a_guard(fit: Fit, model_dir: Path) -> None:
    trainer, _ = fit("plain", data=make_data(("only",)))
    path = Path(str(trainer.log_dir)) / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    module = marked(model_dir)
    rule = Rule(**MARKED, actions=["reset_teacher"])
    fit("guarded", module, make_data(("only",)), callbacks=[Guard(length=rule)], ckpt_path=path)
    for name, value in module.good_teacher.state_dict().items():  # type: ignore[operator,union-attr]
        assert torch.equal(value, saved[f"teacher.{name}"])


# ---------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": 0}, "guard.window must be at least 1"),
        ({"warmup": 60}, "guard.warmup must be at most guard.window, 50, found 60"),
        ({"max_skipped": 0}, "guard.max_skipped must be at least 1"),
        ({"measure_every_n_steps": -1}, "guard.measure_every_n_steps must be 0 or more"),
        ({"lr_factor": 1.0}, "guard.lr_factor must lie between 0 and 1"),
        ({"min_lr_factor": 0.0}, r"guard.min_lr_factor must lie in \(0, 1\]"),
        ({"nonfinite": ["stop"]}, "guard.nonfinite.actions: found 'stop'"),
        ({"entropy": Rule(patience=0)}, "guard.entropy.patience"),
    ],
)
def test_bad_settings(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Guard(**options)


def test_actions_on_a_teacher_need_one(fit: Fit, model_dir: Path) -> None:
    guard = Guard(length=Rule(actions=["freeze_teacher"]))
    with pytest.raises(ValueError, match="freeze_teacher needs a teacher, and the method 'sft'"):
        fit(module=make_method(SFTModule, model_dir), callbacks=[guard])
    guard = Guard(length=Rule(actions=["reset_teacher"]))
    with pytest.raises(ValueError, match=r"teacher\.kind 'live'"):
        fit(teacher=EMATeacher("live"), callbacks=[guard])
