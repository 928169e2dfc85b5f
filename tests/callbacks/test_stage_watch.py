"""Probes on the way: what they find, what follows from it, and that looking changes nothing."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import echo_examples, make_module, make_task
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import Overlap, assert_same, outcome, tensors
from torch import Tensor

from sdft import ContinualDataModule, Example, PythonTask, SDFTModule
from sdft.callbacks import StageWatch
from sdft.callbacks.standing import Policy, Standing
from sdft.mixtures import Batches, Mixture, Stream
from sdft.schedule import StageSchedule
from sdft.scorers import Scorer

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]
Script = Mapping[int, float]
"""Optimizer step → the score from there on."""


class Diary(Callback):
    """What happened: batches, rates and validations. Tells scripted scorers the time."""

    def __init__(self) -> None:
        self.step = 0
        self.batches: list[tuple[int, int]] = []
        self.rates: list[tuple[int, float]] = []
        self.validated: list[tuple[int, int]] = []
        self.phases: list[str] = []
        self.modes: list[list[bool]] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.trainer = trainer

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append((trainer.current_epoch, batch_idx))
        self.modes.append([module.training for module in pl_module.modules()])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append((trainer.current_epoch, optimizer.param_groups[0]["lr"]))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.phases.append(pl_module.phases.current)
        self.modes.append([module.training for module in pl_module.modules()])

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.validated.append((trainer.current_epoch, trainer.global_step))

    def count(self, stage: int) -> int:
        return sum(epoch == stage for epoch, _ in self.batches)


class Scripted(Scorer):
    """The score that a script has for the optimizer step under way."""

    def __init__(self, diary: Diary, script: Script) -> None:
        self.diary = diary
        self.script = script

    def __call__(self, response: str, example: Example) -> float:
        step = self.diary.trainer.global_step
        return self.script[max(start for start in self.script if start <= step)]


class Weighted(SDFTModule):
    """A method with a weight that scales its loss, as one that distils has."""

    distil_weight = 0.3

    def loss(self, student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, mask: Tensor) -> Tensor:
        return self.distil_weight * super().loss(student_logits_BTV, teacher_logits_BTV, mask)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["distil_weight"] = self.distil_weight

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.distil_weight = checkpoint["distil_weight"]


class Halves(Mixture):
    """Leaves the batches as they are, with a schedule of its own for each half."""

    def mix(self, stream: Stream, stage: int, batches: Batches, seed: int) -> Batches:
        return batches

    def segments(self, batches: int) -> list[int]:
        return [batches - batches // 2, batches // 2]


RISING: Script = {step: step / 100 for step in range(60)}
FLAT: Script = {0: 0.5}


def stream(diary: Diary, scripts: Mapping[str, Script], **options: Any) -> ContinualDataModule:
    """A task per script; the one named `prior` is a suite."""
    tasks = [make_task(name, scorer=Scripted(diary, script)) for name, script in scripts.items()]
    old = [task for task in tasks if task.name == "prior"]
    new = [task for task in tasks if task.name != "prior"]
    return ContinualDataModule(new, suites=old, **{"batch_size": 4, "steps": 12} | options)


def weighted(folder: Path, **options: Any) -> Weighted:
    module = make_module(folder)
    return Weighted(
        model_name=str(folder),
        max_new_tokens=6,
        teacher_template=module.template.text,
        skip_first_tokens=1,
        **{"optimizer": module.optimizer} | options,
    )


def lines(trainer: Trainer) -> list[dict[str, Any]]:
    path = Path(trainer.log_dir) / "watch.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def actions(trainer: Trainer) -> list[tuple[int, str, str, str]]:
    """Step, action, reason and column of everything that was done."""
    return [
        (line["step"], action["action"], action["reason"], action["column"])
        for line in lines(trainer)
        for action in line["actions"]
    ]


def run(
    fit: Fit,
    scripts: Mapping[str, Script],
    data: Mapping[str, Any] | None = None,
    fitting: Mapping[str, Any] | None = None,
    **watch: Any,
) -> tuple[Trainer, Any, Diary]:
    """A fit with scripted scores, watched every two steps; by default it acts for patience only."""
    diary = Diary()
    settings = {"every_n_steps": 2, "patience": 2, "on_drop": "ignore"} | watch
    trainer, module = fit(
        data=stream(diary, scripts, **data or {}),
        callbacks=[StageWatch(**settings), diary],
        **fitting or {},
    )
    return trainer, module, diary


# ---------------------------------------------------------------- patience


def test_a_stage_ends_when_its_task_stops_improving(fit: Fit) -> None:
    """Flat from step 4 on: the probes at 6 and 8 are in vain."""
    flat_later = {0: 0.1, 2: 0.2, 4: 0.3}
    trainer, _, diary = run(fit, {"first": flat_later, "second": RISING, "prior": FLAT})
    assert [diary.count(stage) for stage in (0, 1)] == [8, 12]
    assert trainer.global_step == 20
    assert actions(trainer) == [(8, "stop", "patience", "first")]
    (action,) = [a for line in lines(trainer) for a in line["actions"]]
    assert (action["reference"], action["score"]) == (0.3, 0.3)


def test_a_stage_that_improves_goes_on(fit: Fit) -> None:
    trainer, _, _ = run(fit, {"first": RISING, "second": RISING, "prior": FLAT}, patience=1)
    assert trainer.global_step == 24
    assert actions(trainer) == []


@pytest.mark.parametrize(("min_delta", "steps"), [(0.04, 4), (0.039, 12)])
def test_an_improvement_is_more_than_min_delta(fit: Fit, min_delta: float, steps: int) -> None:
    """It rises by 0.02 from probe to probe: small steps add up."""
    trainer, _, _ = run(fit, {"first": RISING}, patience=2, min_delta=min_delta)
    assert trainer.global_step == steps


def test_no_patience_never_ends_a_stage(fit: Fit) -> None:
    trainer, _, _ = run(fit, {"first": FLAT, "prior": FLAT}, patience=None)
    assert trainer.global_step == 12


def test_patience_starts_afresh_in_every_stage(fit: Fit) -> None:
    """The score with which a stage starts is the first to beat."""
    trainer, _, diary = run(fit, {"first": FLAT, "second": FLAT})
    assert [diary.count(stage) for stage in (0, 1)] == [4, 4]
    assert [line["step"] for line in lines(trainer) if line["start"]] == [0, 4]
    assert [line["stale"] for line in lines(trainer)] == [0, 1, 2] * 2


def test_probes_are_counted_from_the_start_of_each_stage(fit: Fit) -> None:
    scripts = {"first": RISING, "second": RISING}
    trainer, _, _ = run(fit, scripts, data={"steps": 5})
    found = [(line["step"], line["start"]) for line in lines(trainer)]
    assert found == [(0, True), (2, False), (4, False), (5, True), (7, False), (9, False)]


# ---------------------------------------------------------------- drops


def test_a_drop_raises_the_weight(fit: Fit, model_dir: Path) -> None:
    dips = {0: 1.0, 2: 0.94, 4: 0.95, 6: 0.9}
    trainer, module, _ = run(
        fit,
        {"first": RISING, "prior": dips},
        fitting={"module": weighted(model_dir)},
        on_drop="raise_weight",
        raise_by=0.125,
    )
    found = {line["step"]: line["weight"] for line in lines(trainer)}
    assert found == {0: 0.3, 2: 0.425, 4: 0.425, 6: 0.55, 8: 0.675, 10: 0.8}
    assert module.distil_weight == 0.8
    assert trainer.global_step == 12
    assert actions(trainer)[0] == (2, "raise_weight", "drop", "prior")


def test_the_weight_stops_at_its_maximum(fit: Fit, model_dir: Path) -> None:
    scripts = {"first": RISING, "prior": {0: 1.0, 2: 0.5}}
    options = {"on_drop": "raise_weight", "raise_by": 0.1, "max_weight": 0.45}
    trainer, module, _ = run(fit, scripts, fitting={"module": weighted(model_dir)}, **options)
    assert [line["weight"] for line in lines(trainer)] == [0.3, 0.4, 0.45, 0.45, 0.45, 0.45]
    assert [action for _, action, *_ in actions(trainer)] == ["raise_weight"] * 2 + ["at_max"] * 3
    assert module.distil_weight == 0.45
    assert trainer.global_step == 12


def test_a_weight_above_the_maximum_is_left_alone(fit: Fit, model_dir: Path) -> None:
    module = weighted(model_dir)
    module.distil_weight = 0.9
    scripts = {"first": RISING, "prior": {0: 1.0, 2: 0.5}}
    run(fit, scripts, fitting={"module": module}, on_drop="raise_weight", max_weight=0.5)
    assert module.distil_weight == 0.9


def test_a_drop_ends_the_stage(fit: Fit) -> None:
    scripts = {"first": RISING, "second": RISING, "prior": {0: 1.0, 6: 0.9, 7: 1.0}}
    trainer, _, diary = run(fit, scripts, on_drop="stop")
    assert [diary.count(stage) for stage in (0, 1)] == [6, 12]
    assert actions(trainer) == [(6, "stop", "drop", "prior")]
    (action,) = [a for line in lines(trainer) for a in line["actions"]]
    assert (action["reference"], action["score"]) == (1.0, 0.9)


def test_both_raise_first_and_stop_where_that_did_not_help(fit: Fit, model_dir: Path) -> None:
    scripts = {"first": RISING, "second": RISING, "prior": {0: 1.0, 2: 0.5, 8: 0.99}}
    options = {"on_drop": "both", "raise_by": 0.1, "max_weight": 0.5, "every_n_steps": 1}
    trainer, module, diary = run(fit, scripts, fitting={"module": weighted(model_dir)}, **options)
    assert actions(trainer)[:3] == [
        (2, "raise_weight", "drop", "prior"),
        (3, "raise_weight", "drop", "prior"),
        (4, "stop", "drop", "prior"),
    ]
    assert module.distil_weight == 0.5
    assert diary.count(0) == 4
    persisting = [step for step, action, *_ in actions(trainer)[3:] if action == "stop"]
    assert persisting == [5], "the next stage, too, starts with the drop"


def test_both_go_on_where_raising_helped(fit: Fit, model_dir: Path) -> None:
    scripts = {"first": RISING, "prior": {0: 1.0, 2: 0.5, 6: 0.99}}
    options = {"on_drop": "both", "raise_by": 0.1, "max_weight": 0.5}
    trainer, module, _ = run(fit, scripts, fitting={"module": weighted(model_dir)}, **options)
    assert [action for _, action, *_ in actions(trainer)] == ["raise_weight"] * 2
    assert trainer.global_step == 12
    assert module.distil_weight == 0.5


def test_a_drop_may_be_ignored(fit: Fit, model_dir: Path) -> None:
    module = weighted(model_dir)
    trainer, _, _ = run(
        fit, {"first": RISING, "prior": {0: 1.0, 2: 0.0}}, fitting={"module": module}
    )
    assert actions(trainer) == []
    assert trainer.global_step == 12
    assert module.distil_weight == 0.3


@pytest.mark.parametrize(("score", "steps"), [(0.95, 12), (0.9499, 2)])
def test_a_drop_is_more_than_max_drop(fit: Fit, score: float, steps: int) -> None:
    scripts = {"first": RISING, "prior": {0: 1.0, 1: score}}
    trainer, _, _ = run(fit, scripts, on_drop="stop", max_drop=0.05)
    assert trainer.global_step == steps


def test_a_task_is_old_once_the_next_one_trains(fit: Fit) -> None:
    """It may fall in its own stage; after that it is held to its best start of a stage."""
    first = {0: 0.2, 2: 0.9, 4: 0.0, 12: 0.7, 16: 0.6}
    scripts = {"first": first, "second": RISING}
    trainer, _, diary = run(fit, scripts, on_drop="stop", patience=None)
    assert [diary.count(stage) for stage in (0, 1)] == [12, 4]
    assert actions(trainer) == [(16, "stop", "drop", "first")]
    assert lines(trainer)[-1]["references"] == {"first": 0.7, "second": 0.12}


def test_a_reference_is_the_best_of_all_starts(fit: Fit) -> None:
    """The suite is worse at the start of the second stage: measured by the base, it has dropped."""
    scripts = {"first": RISING, "second": RISING, "prior": {0: 1.0, 12: 0.9}}
    trainer, _, _ = run(fit, scripts, on_drop="stop")
    assert actions(trainer) == [(14, "stop", "drop", "prior")]
    assert lines(trainer)[-1]["references"]["prior"] == 1.0


# ---------------------------------------------------------------- how a stage ends early


def rates_of(parts: list[int], made: int) -> list[float]:
    """The first rates of a stage of these parts, by a schedule of their own."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = StageSchedule(optimizer, warmup_steps=2)
    schedule.plan([parts])
    found = []
    for _ in range(made):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_early_end_is_a_whole_end(
    fit: Fit, model_dir: Path, halves: bool, accumulate: int
) -> None:
    """Rates, rows, checkpoints, validation and steps, also where a stage has two schedules."""
    module = make_module(
        model_dir,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        scheduler=lambda optimizer: StageSchedule(optimizer, warmup_steps=2),
    )
    trainer, _, diary = run(
        fit,
        {"first": FLAT, "second": RISING, "third": FLAT},
        data={"mixtures": [Halves()] if halves else []},
        fitting={"module": module, "accumulate_grad_batches": accumulate},
    )
    made = {0: 4, 1: 12, 2: 4}
    assert {stage: diary.count(stage) for stage in made} == {
        stage: steps * accumulate for stage, steps in made.items()
    }
    for stage, steps in made.items():
        assert [i for s, i in diary.batches if s == stage] == list(range(steps * accumulate))
        parts = [6, 6] if halves else [12]
        rates = [rate for s, rate in diary.rates if s == stage]
        assert rates == pytest.approx(rates_of(parts, steps))
    assert trainer.global_step == 20
    assert diary.validated == [(0, 4), (1, 16), (2, 20)]
    folder = Path(trainer.log_dir)
    saved = {p.name: torch.load(p, weights_only=True) for p in folder.rglob("*.ckpt")}
    assert {name: found["global_step"] for name, found in saved.items()} == {
        "step-19.ckpt": 19,
        "step-20.ckpt": 20,
        "stage-1-first.ckpt": 4,
        "stage-2-second.ckpt": 16,
        "stage-3-third.ckpt": 20,
        "last.ckpt": 20,
    }
    rows = json.loads((folder / "retention.json").read_text())["matrix"]
    assert [len(row) for row in rows] == [3] * 4


def test_a_step_that_is_under_way_is_finished(fit: Fit) -> None:
    """Probes follow optimizer steps, whatever the accumulation; a stage's rest makes its last."""
    trainer, _, diary = run(
        fit,
        {"first": RISING, "second": FLAT},
        data={"steps": None, "epochs": 4},  # 8 batches: 3 steps of 3, 3 and 2
        fitting={"accumulate_grad_batches": 3},
        every_n_steps=1,
        patience=1,
    )
    assert [diary.count(stage) for stage in (0, 1)] == [8, 3]
    assert trainer.global_step == 4
    assert [line["step"] for line in lines(trainer)] == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- looking changes nothing


class Drawing(Scorer):
    """Draws from the generator that training draws from."""

    def __call__(self, response: str, example: Example) -> float:
        torch.rand(3)
        return 0.5


def test_probes_change_nothing(fit: Fit, gpt2_dir: Path) -> None:
    """Off, and on without acting: the run without the callback, bit for bit. It has dropout."""

    def data() -> ContinualDataModule:
        tasks = [make_task(name, scorer=Drawing()) for name in ("first", "second", "prior")]
        return ContinualDataModule(tasks[:2], suites=tasks[2:], batch_size=4, steps=3)

    plain = outcome(*fit("plain", make_module(gpt2_dir), data()))
    off = outcome(*fit("off", make_module(gpt2_dir), data(), callbacks=[StageWatch()]))
    assert_same(off, plain)
    watch = StageWatch(every_n_steps=1, patience=None, on_drop="ignore")
    trainer, module = fit("on", make_module(gpt2_dir), data(), callbacks=[watch])
    assert len(lines(trainer)) == 6
    assert_same(outcome(trainer, module), plain)


def test_a_probe_draws_nothing_that_training_would_draw(fit: Fit) -> None:
    states: list[Tensor] = []

    class Note(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            states.append(torch.get_rng_state())

        def on_train_batch_end(self, *args: Any) -> None:
            states.append(torch.get_rng_state())

    data = ContinualDataModule([make_task("only", scorer=Drawing())], batch_size=4, steps=3)
    watch = StageWatch(every_n_steps=1, patience=None, on_drop="ignore")
    fit(data=data, callbacks=[Note(), watch, Note()])
    assert len(states) == 12
    for before, after in zip(states[::2], states[1::2], strict=True):
        assert torch.equal(before, after)


def test_modes_and_phases_are_as_before(fit: Fit) -> None:
    _, module, diary = run(fit, {"first": RISING}, every_n_steps=1)
    assert set(diary.phases) == {"update"}
    assert all(mode == diary.modes[0] for mode in diary.modes)
    assert module.student.training


def test_off_by_default(fit: Fit) -> None:
    trainer, _ = fit(callbacks=[StageWatch()])
    assert trainer.global_step == 6
    assert not (Path(trainer.log_dir) / "watch.jsonl").exists()


# ---------------------------------------------------------------- resume

WATCHED: dict[str, Any] = {
    "every_n_steps": 1,
    "patience": 2,
    "on_drop": "raise_weight",
    "raise_by": 0.2,
}


def resumable(fit: Fit, model_dir: Path, root: str, **options: Any) -> dict[str, Tensor]:
    """The first stage ends at step 5 of 8 and raises the weight twice, the second at 3 of 8."""
    diary = Diary()
    watch = StageWatch(**WATCHED)
    callbacks = [watch, diary, *options.pop("callbacks", [])]
    scripts = {
        "first": {0: 0.1, 2: 0.2, 3: 0.3},
        "second": {0: 0.0, 6: 0.3},
        "prior": {0: 1.0, 2: 0.5, 4: 0.96},
    }
    data = stream(diary, scripts, steps=8, reset_optimizer_between_tasks=True)
    real = make_task("overlap", scorer=Overlap())
    data.suites.append(real)
    trainer, module = fit(root, weighted(model_dir), data, callbacks=callbacks, **options)
    assert trainer.global_step == 8
    rest = {"watch": watch.state_dict(), "weight": module.distil_weight}
    return outcome(trainer, module) | tensors(rest)


def test_a_resumed_run_is_the_uninterrupted_one(fit: Fit, model_dir: Path, tmp_path: Path) -> None:
    """From every step: the middle of a stage, its early last batch, and the boundary."""
    every_step = ModelCheckpoint(
        tmp_path / "steps",
        "{step}",
        save_top_k=-1,
        every_n_train_steps=1,
        save_on_train_epoch_end=False,
    )
    whole = resumable(fit, model_dir, "whole", callbacks=[every_step])
    assert whole["/weight"] > Weighted.distil_weight, "it was raised, and so was trained with"
    stages = sorted((tmp_path / "whole").rglob("stage-*.ckpt"))
    steps = [tmp_path / "steps" / f"step={step}.ckpt" for step in range(1, 9)]
    ended = torch.load(steps[4], weights_only=True)["loops"]["fit_loop"]["state_dict"]
    assert ended["combined_loader"][0] == {
        "stage": 0,
        "yielded": 5,
        "ended": True,
        "batches": 8,
    }
    for path in [*steps, *stages]:
        resumed = resumable(fit, model_dir, f"from {path.stem}", ckpt_path=path)
        assert_same(resumed, whole)


def test_a_checkpoint_of_an_unwatched_run_can_be_watched(
    fit: Fit, model_dir: Path, tmp_path: Path
) -> None:
    """In the middle of a stage: the first probe gives the references."""
    scripts = {"first": RISING, "prior": {0: 1.0, 2: 0.8, 6: 0.6}}
    diary = Diary()
    early = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    fit("plain", data=stream(diary, scripts), callbacks=[diary, early])
    resumed = {"root": "resumed", "ckpt_path": tmp_path / "step=3.ckpt"}
    trainer, _, _ = run(fit, scripts, fitting=resumed, on_drop="stop", patience=None)
    assert actions(trainer) == [(6, "stop", "drop", "prior")]
    assert [(line["step"], line["stage"]) for line in lines(trainer)] == [(4, 0), (6, 0)]


# ---------------------------------------------------------------- what is watched


def test_only_so_many_validation_examples(fit: Fit) -> None:
    seen: list[str] = []

    class Noting(Scorer):
        def __call__(self, response: str, example: Example) -> float:
            seen.append(example.prompt)
            return 0.5

    examples = echo_examples(5, offset=50)
    task = PythonTask("only", train=echo_examples(6), validation=examples, scorer=Noting())
    fit(
        data=ContinualDataModule([task], batch_size=4, steps=2),
        callbacks=[StageWatch(every_n_steps=1, limit=3, on_drop="ignore", patience=None)],
        limit_val_batches=0,
    )
    probes = [e.prompt for e in examples[:3]]
    row = [e.prompt for e in examples]  # without a test split, retention reads this one
    assert seen == row + probes + probes + row


def test_what_cannot_be_watched_is_said_once(
    fit: Fit, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = [
        PythonTask(name, train=echo_examples(3), test=echo_examples(2)) for name in ("one", "two")
    ]
    data = ContinualDataModule([*silent, make_task("last")], batch_size=4, steps=2)
    with caplog.at_level(logging.WARNING, logger="sdft.callbacks.stage_watch"):
        trainer, _ = fit(data=data, callbacks=[StageWatch(every_n_steps=1, on_drop="stop")])
    said = [r.message for r in caplog.records if r.name == "sdft.callbacks.stage_watch"]
    assert said == [
        "without validation examples, hence not watched: one, two",
        "no old task or suite can be watched in any stage: no drop will be seen",
    ]
    assert [set(line["scores"]) for line in lines(trainer)] == [set()] * 4 + [{"last"}] * 2
    out = capsys.readouterr().out
    assert "watch: stage 1 starts at no score; no old task or suite to watch" in out


def test_nothing_to_watch_is_an_error(fit: Fit) -> None:
    data = ContinualDataModule([PythonTask("one", train=echo_examples(3))], steps=1)
    with pytest.raises(ValueError, match="no task or suite has validation examples"):
        fit(data=data, callbacks=[StageWatch(every_n_steps=1, on_drop="stop")])


def test_a_scorer_that_raises_costs_one_column(fit: Fit) -> None:
    def broken(response: str, example: Example) -> float:
        raise RuntimeError("no such tool")

    tasks = [make_task("good", scorer=Overlap()), make_task("bad", scorer=broken)]
    data = ContinualDataModule(tasks, batch_size=4, steps=2)
    trainer, _ = fit(data=data, callbacks=[StageWatch(every_n_steps=1, on_drop="ignore")])
    assert [set(line["scores"]) for line in lines(trainer)] == [{"good"}] * 4
    assert lines(trainer)[-1]["best"] is None, "the second stage has no score of its own"


def test_models_of_their_own_have_nothing_old(fit: Fit) -> None:
    scripts = {"first": {0: 1.0, 12: 0.0}, "second": RISING, "prior": {0: 1.0, 2: 0.0}}
    trainer, _, _ = run(
        fit, scripts, data={"from_base_each_task": True}, on_drop="stop", patience=None
    )
    assert actions(trainer) == []
    assert [list(line["scores"]) for line in lines(trainer)] == [["first"]] * 5 + [["second"]] * 5
    assert not any(line["start"] for line in lines(trainer)), "the base comes after the start"


def test_a_method_without_the_weight_is_refused(fit: Fit) -> None:
    fit(callbacks=[StageWatch(every_n_steps=100)])  # left open, it stops the stage instead
    for on_drop in ("raise_weight", "both"):
        with pytest.raises(ValueError, match=r"watch.on_drop.*distil_weight.*'sdft'.*stop or"):
            fit(callbacks=[StageWatch(every_n_steps=1, on_drop=on_drop)])
    trainer, _ = fit(callbacks=[StageWatch()])  # off: nobody asks for it
    assert trainer.global_step == 6


# ---------------------------------------------------------------- what is told


def test_probes_reach_the_logger_and_actions_the_terminal(
    fit: Fit, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = {"first": {0: 0.25, 2: 0.5}, "prior": {0: 1.0, 4: 0.75, 5: 1.0}}
    trainer, _, _ = run(
        fit, scripts, fitting={"module": weighted(model_dir)}, on_drop="raise_weight"
    )
    events = EventAccumulator(str(trainer.log_dir)).Reload()
    found = {
        name: [(e.step, pytest.approx(e.value)) for e in events.Scalars(f"watch/{name}")]
        for name in ("first", "prior", "weight")
    }
    assert found == {
        "first": [(0, 0.25), (2, 0.5), (4, 0.5), (6, 0.5)],
        "prior": [(0, 1.0), (2, 1.0), (4, 0.75), (6, 1.0)],
        "weight": [(0, 0.3), (2, 0.3), (4, 0.4), (6, 0.4)],
    }
    out = capsys.readouterr().out
    assert "watch: stage 1 starts at first 0.250, prior 1.000\n" in out
    drop = "'prior' at 0.750 has dropped from 1.000: distil_weight raised to 0.4\n"
    assert f"watch: step 4: {drop}" in out
    patience = "'first' at 0.500 no longer improves on 0.500: the stage ends\n"
    assert f"watch: step 6: {patience}" in out


# ---------------------------------------------------------------- the judgement


scores = st.lists(st.integers(0, 8).map(lambda n: n / 8), min_size=1, max_size=12)


@given(scores, st.integers(1, 4))
def test_patience_counts_what_did_not_improve(found: list[float], patience: int) -> None:
    """Against a plain count: out of patience where the last probes hold no new best."""
    policy = Policy(patience, 0.0, 1.0, "ignore", 0.1, 1.0)
    standing = Standing()
    for place, score in enumerate(found):
        stopped = policy.judge(standing, "own", {"own": score}, None)
        best = found.index(max(found[: place + 1]))
        assert bool(stopped) is (place - best >= patience)


@given(scores, st.floats(0.01, 1.0), st.floats(0.0, 1.0), st.floats(0.01, 1.0))
def test_a_weight_rises_by_so_much_up_to_its_maximum(
    found: list[float], raise_by: float, weight: float, max_weight: float
) -> None:
    policy = Policy(None, 0.0, 0.0, "raise_weight", raise_by, max_weight)
    standing = Standing(references={"old": 1.0})
    for score in found:
        before = weight
        for action in policy.judge(standing, "own", {"old": score}, weight):
            weight = action.weight or 0.0
        fell = score < 1.0
        expected = min(before + raise_by, max_weight) if fell and before < max_weight else before
        assert weight == pytest.approx(expected, abs=1e-8)
        assert weight <= max(max_weight, before)


def test_the_deepest_drop_is_named() -> None:
    standing = Standing(references={"a": 0.5, "b": 1.0, "c": 1.0})
    found = {"own": 0.0, "a": 0.0, "b": 0.4, "c": 0.9}
    (action,) = Policy(None, 0.0, 0.2, "stop", 0.1, 1.0).judge(standing, "own", found, None)
    assert (action.column, action.reference, action.score) == ("b", 1.0, 0.4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"every_n_steps": -1}, "watch.every_n_steps must be 0 or more, found -1"),
        ({"limit": 0}, "watch.limit must be at least 1, found 0"),
        ({"patience": 0}, "watch.patience must be at least 1 or null, found 0"),
        ({"min_delta": -0.1}, "watch.min_delta must lie"),
        ({"max_drop": 1.5}, "watch.max_drop must lie"),
        ({"max_drop": math.nan}, "watch.max_drop must lie"),
        ({"raise_by": 0.0}, "watch.raise_by must be above 0"),
        ({"raise_by": math.inf}, "watch.raise_by must lie"),
        ({"max_weight": 1.1}, "watch.max_weight must lie"),
        ({"on_drop": "panic"}, "watch.on_drop must be one of raise_weight, stop, both, ignore"),
    ],
)
def test_a_bad_value_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        StageWatch(**options)
