"""Rollouts drawn ahead: what is drawn when, by whom, and what a checkpoint carries of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import echo_examples, make_data, make_module
from lightning.pytorch import Callback, Trainer
from test_resume import Runs, assert_same, outcome
from torch import distributed, multiprocessing

from sdft import SDFTModule
from sdft.batch import Batch
from sdft.methods import AnchorReplayModule
from sdft.mixtures import PastReplay
from sdft.rollout import Rollout
from sdft.run import end_stage
from sdft.window import Draw, Window, of_all_ranks, window_end

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


def draw(value: int, rows: int = 2, version: int = 0) -> Draw:
    ids = torch.full((rows, 3), value)
    truncated = torch.zeros(rows).bool()
    return Draw(Rollout(ids, ids > 0, truncated, -ids.float()), version, 3)


def prompts(value: int, rows: int = 2) -> Batch:
    return Batch(echo_examples(rows), [[value, row] for row in range(rows)])


# ---------------------------------------------------------------- the window itself


@pytest.mark.parametrize(
    ("index", "updates", "accumulate", "end"),
    [(0, 1, 1, 1), (0, 3, 1, 3), (2, 3, 1, 3), (3, 3, 1, 6), (5, 2, 2, 8), (3, 2, 2, 4)],
)
def test_windows_stand_side_by_side(index: int, updates: int, accumulate: int, end: int) -> None:
    assert window_end(index, updates, accumulate) == end


def test_a_draw_is_used_once_by_its_batch_and_its_stage() -> None:
    window = Window()
    for index in range(4):
        window.put(1, index, prompts(index), draw(index))
    taken = window.take(1, 1, prompts(1))
    assert taken is not None
    assert taken.completion.ids_BT[0, 0] == 1
    assert len(window) == 2, "those before it are of no more use"
    assert window.take(1, 1, prompts(1)) is None
    assert window.take(1, 2, prompts(9)) is None, "other prompts"
    assert window.take(1, 3, prompts(3)) is not None
    window.put(1, 7, prompts(7), draw(7))
    assert window.take(2, 7, prompts(7)) is None, "another stage"
    assert len(window) == 0
    window.put(2, 0, prompts(0), draw(0))
    window.put(3, 1, prompts(1), draw(1))
    assert len(window) == 1


def test_its_state_is_made_of_tensors_and_numbers(tmp_path: Path) -> None:
    window = Window()
    window.put(1, 5, prompts(4), draw(4, version=17))
    torch.save(window.state_dict(), tmp_path / "state.pt")
    other = Window()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    found = other.take(1, 5, prompts(4))
    assert found is not None
    assert (found.version, found.limit) == (17, 3)
    for name in ("ids_BT", "mask_BT", "truncated_B", "logps_BT"):
        expected = getattr(draw(4).completion, name)
        assert torch.equal(getattr(found.completion, name), expected)


def _in_one_of_two(rank: int, folder: str) -> None:
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    window = Window()
    window.put(0, 1, prompts(rank), draw(rank))
    states = of_all_ranks(window.state_dict())
    assert len(states) == 2
    for other, state in enumerate(states):
        restored = Window()
        restored.load_state_dict(state)
        found = restored.take(0, 1, prompts(other))
        assert found is not None
        assert found.completion.ids_BT[0, 0] == other
    distributed.destroy_process_group()


@pytest.mark.slow
def test_a_checkpoint_carries_those_of_every_process(tmp_path: Path) -> None:
    assert of_all_ranks({"stage": 0}) == [{"stage": 0}]
    multiprocessing.spawn(_in_one_of_two, (str(tmp_path),), nprocs=2)


# ---------------------------------------------------------------- in a run


class Recorder(Callback):
    """Every call of the engine in training, every batch, and what was logged of it."""

    def __init__(self, end_after: int | None = None) -> None:
        self.calls: list[list[list[int]]] = []
        self.batches: list[list[list[int]]] = []
        self.logged: list[dict[str, float]] = []
        self.yielded: list[int] = []
        self.end_after = end_after

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        real = pl_module.engine.generate

        def generate(model: Any, prompts: Any, *rest: Any) -> Rollout:
            if pl_module.phases.current == "generate":
                self.calls.append([list(ids) for ids in prompts])
            rollout: Rollout = real(model, prompts, *rest)
            return rollout

        pl_module.engine.generate = generate

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, index: int
    ) -> None:
        self.batches.append(batch.student_ids)
        self.yielded.append(trainer.train_dataloader.state_dict()["yielded"])  # type: ignore[union-attr]
        found = trainer.callback_metrics
        self.logged.append(
            {key: float(found[key]) for key in found if key.startswith(("train/", "seconds/"))}
        )
        if index + 1 == self.end_after:
            end_stage(trainer)

    def values(self, key: str) -> list[float]:
        return [values[f"train/{key}"] for values in self.logged]


@pytest.mark.parametrize("rollouts", [1, 2])
def test_one_call_of_the_engine_draws_for_several_steps(
    fit: Fit, model_dir: Path, rollouts: int
) -> None:
    seen = Recorder()
    module = make_module(model_dir, updates_per_generation=3, rollouts_per_prompt=rollouts)
    fit(module=module, data=make_data(steps=5), callbacks=[seen])
    expected = []
    for stage in range(2):  # windows of 3 steps, and what is left of a stage
        own = seen.batches[5 * stage : 5 * stage + 5]
        for part in (own[:3], own[3:]):
            expected.append([ids for batch in part for ids in batch for _ in range(rollouts)])
    assert seen.calls == expected
    assert seen.values("staleness") == [0, 1, 2, 0, 1] * 2
    assert seen.yielded == [1, 2, 3, 4, 5] * 2, "looking ahead hands nothing out"


def test_the_batches_are_those_of_the_run_that_draws_each_alone(fit: Fit, model_dir: Path) -> None:
    seen = Recorder(), Recorder()
    for updates, recorder in zip((1, 2), seen, strict=True):
        module = make_module(model_dir, updates_per_generation=updates)
        data = make_data(steps=4, mixtures=[PastReplay(0.5)])
        fit(module=module, data=data, callbacks=[recorder])
    one, two = seen
    assert two.batches == one.batches
    assert max(map(len, two.batches)) > 4, "replay joined rows"
    assert one.calls == one.batches
    pairs = zip(two.batches[::2], two.batches[1::2], strict=True)
    assert two.calls == [[*first, *second] for first, second in pairs]


def test_accumulated_batches_belong_to_one_step(fit: Fit, model_dir: Path) -> None:
    seen = Recorder()
    module = make_module(model_dir, updates_per_generation=2)
    fit(module=module, data=make_data(steps=3), callbacks=[seen], accumulate_grad_batches=2)
    assert seen.values("staleness") == [0, 0, 1, 1, 0, 0] * 2
    assert len(seen.calls) == 4


def test_a_stage_that_ends_early_takes_its_window_with_it(fit: Fit, model_dir: Path) -> None:
    seen = Recorder(end_after=2)
    module = make_module(model_dir, updates_per_generation=3)
    fit(module=module, data=make_data(steps=6), callbacks=[seen])
    assert seen.values("staleness") == [0, 1] * 2
    second = [ids for batch in seen.batches[2:] for ids in batch]
    assert seen.calls[1][: len(second)] == second
    assert len(seen.calls) == 2, "each stage draws its own"


def test_limited_batches_are_all_that_is_drawn(fit: Fit, model_dir: Path) -> None:
    seen = Recorder()
    module = make_module(model_dir, updates_per_generation=8)
    fit(module=module, data=make_data(steps=6), callbacks=[seen], limit_train_batches=2)
    assert [len(call) for call in seen.calls] == [sum(map(len, seen.batches[:2]))] * 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stale_rollouts_are_weighted_and_fresh_ones_are_not(
    fit: Fit, model_dir: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    weighted: list[tuple[bool, bool]] = []
    real = SDFTModule._log_step

    def log_step(self: Any, batch: Any, drawn: Any, loss: Any, compared: Any) -> None:
        stale = self.global_step > drawn.version
        weighted.append((stale, compared.importance is not None))
        real(self, batch, drawn, loss, compared)

    monkeypatch.setattr(SDFTModule, "_log_step", log_step)
    seen = Recorder()
    module = make_module(model_dir, updates_per_generation=2)
    data = make_data(("only",), steps=4)
    fit(module=module, data=data, callbacks=[seen], accumulate_grad_batches=accumulate)
    steps = [(False, False), (True, True)] * 2
    assert weighted == [step for step in steps for _ in range(accumulate)]
    assert seen.logged[accumulate]["train/importance"] != 1.0
    assert abs(seen.logged[accumulate]["train/importance"] - 1.0) < 0.5
    assert 0 <= seen.logged[accumulate]["train/importance_capped"] <= 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_weights_of_a_student_that_stands_still_are_1(
    fit: Fit, model_dir: Path, temperature: float
) -> None:
    seen = Recorder()
    module = make_module(
        model_dir,
        updates_per_generation=3,
        temperature=temperature,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    )
    fit(module=module, data=make_data(("only",)), callbacks=[seen])
    for values in seen.logged[1:]:
        assert values["train/importance"] == pytest.approx(1.0, abs=1e-5)
        assert values["train/importance_capped"] == 0.0


@pytest.mark.parametrize("kind", [SDFTModule, AnchorReplayModule])
def test_stale_matters_and_recomputing_is_on_policy(
    fit: Fit, model_dir: Path, kind: type[SDFTModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AnchorReplayModule, "needs_rows", None)
    found = {}
    options: dict[str, dict[str, Any]] = {
        "on-policy": {},
        "recompute": {"updates_per_generation": 3, "stale": "recompute"},
        "correct": {"updates_per_generation": 3},
        "ignore": {"updates_per_generation": 3, "stale": "ignore"},
    }
    base = make_module(model_dir)
    for name, changes in options.items():
        settings = {"model_name": base.model_name, "max_new_tokens": 6, "skip_first_tokens": 1}
        optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)  # noqa: E731
        template = "{prompt} shown {demonstration} now"
        module = kind(**settings, teacher_template=template, optimizer=optimizer, **changes)
        fit(module=module, data=make_data(("only",), steps=4))
        found[name] = torch.cat([p.detach().flatten() for p in module.model.parameters()])
    assert torch.equal(found["recompute"], found["on-policy"])
    assert not torch.equal(found["correct"], found["on-policy"])
    assert not torch.equal(found["correct"], found["ignore"])


def test_the_step_that_draws_pays_for_it(fit: Fit, model_dir: Path) -> None:
    """The phases' order is that of every step; log-probabilities count as scoring."""
    module = make_module(model_dir, updates_per_generation=2)
    begun: list[str] = []
    module.phases.listener = begun.append

    class Marks(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            begun.append("|")

    fit(module=module, data=make_data(("only",), steps=2), callbacks=[Marks()])
    steps = " ".join(begun).split("|")[1:]
    first, second = (step.split() for step in steps)
    both = ["generate", "score", "update", "track", "update"]
    assert [p for p in first if p not in ("prepare", "evaluate")][:7] == [*both[:2], *both]
    assert second[:5] == both


# ---------------------------------------------------------------- checkpoints


def test_a_run_resumed_with_another_window_draws_anew(fit: Fit, tmp_path: Path) -> None:
    options = {"module": lambda: {"updates_per_generation": 3}, "data": {"steps": 4}}
    runs = Runs(fit, tmp_path, options)
    expected = outcome(*runs("whole"))
    checkpoint = torch.load(runs.step(1), weights_only=True)
    assert list(checkpoint["rollouts"][0]["draws"]) == [1, 2]
    assert torch.load(runs.step(3), weights_only=True)["rollouts"][0]["draws"] == {}
    assert_same(outcome(*runs("resumed", runs.step(1))), expected)
    del checkpoint["rollouts"]
    torch.save(checkpoint, tmp_path / "without.ckpt")
    without = outcome(*runs("without", tmp_path / "without.ckpt"))
    assert any(not torch.equal(without[key], expected[key]) for key in expected), (
        "the checkpoint's rollouts matter"
    )
    runs.module = lambda: {"updates_per_generation": 2}
    trainer, _ = runs("other", runs.step(1))
    assert trainer.global_step == 8


def test_other_prompts_are_not_given_its_rollouts(fit: Fit, tmp_path: Path) -> None:
    runs = Runs(fit, tmp_path, {"module": lambda: {"updates_per_generation": 3}})
    runs("whole")
    runs.data = {"batch_size": 2}
    trainer, _ = runs("smaller", runs.step(1))
    assert trainer.global_step == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"updates_per_generation": 0}, "updates_per_generation must be at least 1, found 0"),
        ({"stale": "forget"}, "stale must be one of correct, ignore, recompute, found 'forget'"),
    ],
    ids=str,
)
def test_bad_settings_are_named(model_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(model_dir, **options)
