"""The cost of a run: what is counted where, and that nothing measured is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEMPLATE, make_data, make_module
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdft.callbacks import CostReport, Retention
from sdft.cost import PHASES
from sdft.methods import SFTModule

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


def cost_of(trainer: Trainer) -> Any:
    return json.loads((Path(trainer.log_dir) / "cost.json").read_text())


def counts(cost: Any) -> dict[str, tuple[int, int]]:
    """What does not depend on the clock."""
    return {name: (phase["tokens"], phase["flops"]) for name, phase in cost["phases"].items()}


def test_the_content_of_cost_json(fit: Fit) -> None:
    trainer, module = fit(callbacks=[CostReport()])
    found = cost_of(trainer)
    assert set(found) == {
        "phases",
        "training",
        "total",
        "optimizer_steps",
        "parameters",
        "device",
        "processes",
        "threads",
        "memory_kind",
    }
    assert list(found["phases"]) == list(PHASES)
    for name, phase in found["phases"].items():
        if name != "prepare":
            assert phase["seconds"] > 0, name
            assert phase["tokens"] > 0, name
            assert phase["flops"] > 1000 * phase["tokens"], name
            assert phase["tokens_per_second"] == pytest.approx(phase["tokens"] / phase["seconds"])
            assert 2**24 < phase["peak_memory_bytes"] <= found["total"]["peak_memory_bytes"]
    parts = [found["phases"][name] for name in ("prepare", "generate", "score", "update")]
    for key in ("seconds", "tokens", "flops"):
        assert found["training"][key] == pytest.approx(sum(part[key] for part in parts))
    assert found["total"]["flops"] == sum(phase["flops"] for phase in found["phases"].values())
    assert found["optimizer_steps"] == 6
    assert found["parameters"] == sum(p.numel() for p in module.model.parameters())
    assert (found["device"], found["threads"]) == ("cpu", torch.get_num_threads())
    assert found["memory_kind"] == "resident_at_phase_end"


def test_the_tokens_of_training_are_those_of_its_batches(fit: Fit, model_dir: Path) -> None:
    """Prompts of 3 letters and 4 words of the chat template; demonstrations of 3 and their end."""
    module = SFTModule(model_name=str(model_dir), max_new_tokens=6, teacher_template=TEMPLATE)
    trainer, _ = fit(module=module, callbacks=[CostReport()])
    found = cost_of(trainer)["phases"]
    batches = [4, 2, 4, 4, 2, 4]  # 6 rows in batches of 4, 3 steps a stage
    assert found["update"]["tokens"] == sum(batches) * (7 + 4)
    assert found["generate"]["tokens"] == found["score"]["tokens"] == 0
    # KL to the base at every step: another pass over the same.
    samples = 2 * 2 * 7  # prompts of the samples of two stages, twice: drawn and scored
    assert found["track"]["tokens"] > sum(batches) * (7 + 4) + 2 * samples


def test_evaluation_counts_as_evaluation(fit: Fit) -> None:
    """Lightning's validation too, and what it takes from no other phase."""
    with_it, _ = fit("with", callbacks=[CostReport()])
    without, _ = fit("without", callbacks=[CostReport()], limit_val_batches=0)
    several, _ = fit("several", callbacks=[CostReport()], val_check_interval=1)
    found, bare, more = counts(cost_of(with_it)), counts(cost_of(without)), counts(cost_of(several))
    once = found["evaluate"][0] - bare["evaluate"][0]
    assert once >= 2 * 2 * 2 * (7 + 1), "two stages, two tasks of two examples"
    assert more["evaluate"][0] - bare["evaluate"][0] > 2 * once
    for name in ("generate", "score", "update", "track"):
        assert found[name] == bare[name] == more[name]


class NoEvaluation(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        next(c for c in trainer.callbacks if isinstance(c, Retention)).enabled = False


def test_the_optimizer_belongs_to_the_update(fit: Fit) -> None:
    phases: list[str] = []

    class Watch(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            phases.append(pl_module.phases.current)

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            phases.append(pl_module.phases.current)

    fit(callbacks=[Watch(), NoEvaluation()], val_check_interval=1)
    assert set(phases) == {"update"}


def test_writing_a_checkpoint_belongs_to_no_phase(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []
    real = Trainer.save_checkpoint

    def save(self: Trainer, *args: Any, **options: Any) -> None:
        phases.append(self.lightning_module.phases.current)  # type: ignore[union-attr]
        real(self, *args, **options)

    monkeypatch.setattr(Trainer, "save_checkpoint", save)
    fit(callbacks=[CostReport()])
    assert phases == [""] * 8  # every step of six, and two stages


def test_what_begins_a_stage_is_preparation(fit: Fit, model_dir: Path) -> None:
    module = make_module(model_dir)
    phases: list[str] = []
    module.begin_stage = lambda stage: phases.append(module.phases.current)  # type: ignore[method-assign]
    fit(module=module, callbacks=[CostReport()])
    assert phases == ["prepare", "prepare"]


def test_speeds_reach_the_logger(fit: Fit) -> None:
    trainer, _ = fit(callbacks=[CostReport()], val_check_interval=1)
    events = EventAccumulator(str(trainer.log_dir)).Reload()
    for phase in ("generate", "score", "update"):
        assert [e.step for e in events.Scalars(f"seconds/{phase}")] == [0, 1, 2, 3, 4, 5]
        assert all(e.value > 0 for e in events.Scalars(f"tokens_per_second/{phase}"))
    # Measuring between two steps is not put down to the second.
    assert [e.step for e in events.Scalars("seconds/evaluate")] == [0, 3, 6]


def test_no_cost_report(fit: Fit) -> None:
    trainer, module = fit(callbacks=[CostReport(enabled=False)])
    assert not (Path(trainer.log_dir) / "cost.json").exists()
    assert module.phases.totals is None


def test_a_dry_run_leaves_no_file(fit: Fit, tmp_path: Path) -> None:
    fit(callbacks=[CostReport()], fast_dev_run=True)
    assert not list(tmp_path.rglob("cost.json"))


# ---------------------------------------------------------------- broken off and resumed


class Break(Callback):
    """Raises at one step."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step = step
        self.error = error

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


def test_a_run_that_breaks_keeps_what_it_measured(fit: Fit, tmp_path: Path) -> None:
    whole, _ = fit("whole", callbacks=[CostReport()])
    with pytest.raises(RuntimeError, match="no luck"):
        fit("broken", callbacks=[CostReport(), Break(5, RuntimeError("no luck"))])
    (path,) = (tmp_path / "broken").rglob("cost.json")
    found, expected = json.loads(path.read_text()), cost_of(whole)
    assert counts(found)["update"] == counts(expected)["update"], "it broke in the last update"
    assert 0 < found["phases"]["evaluate"]["tokens"] < expected["phases"]["evaluate"]["tokens"]
    assert found["optimizer_steps"] == 5


def test_what_broke_is_what_is_said(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("sdft.callbacks.cost.atomic_write", full)
    with pytest.raises(RuntimeError, match="no luck"):
        fit(callbacks=[CostReport(), Break(1, RuntimeError("no luck"))])


def test_a_run_that_never_began_leaves_nothing(fit: Fit, tmp_path: Path) -> None:
    class Early(Callback):
        def on_fit_start(self, *args: Any) -> None:
            raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        fit(callbacks=[CostReport(), Early()])
    assert not list(tmp_path.rglob("cost.json"))


def test_the_file_is_there_as_soon_as_a_stage_has_ended(fit: Fit) -> None:
    seen: list[int] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            path = Path(trainer.log_dir) / "cost.json"
            seen.append(json.loads(path.read_text())["optimizer_steps"] if path.exists() else 0)

    fit(callbacks=[CostReport(), Watch()])
    assert seen == [0, 0, 0, 3, 3, 3]


@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_a_resumed_run_has_the_cost_of_the_uninterrupted_one(
    fit: Fit, tmp_path: Path, step: int
) -> None:
    saving = ModelCheckpoint(tmp_path / "steps", "{step}", save_top_k=-1, every_n_train_steps=1)
    whole, _ = fit("whole", callbacks=[CostReport(), saving])
    path = tmp_path / "steps" / f"step={step}.ckpt"
    before = next(
        state
        for key, state in torch.load(path, weights_only=True)["callbacks"].items()
        if "CostReport" in key
    )
    resumed, _ = fit("resumed", callbacks=[CostReport()], ckpt_path=path)
    found, expected = cost_of(resumed), cost_of(whole)
    assert counts(found) == counts(expected)
    assert found["optimizer_steps"] == 6
    for name in ("generate", "score", "update", "evaluate"):
        assert found["phases"][name]["seconds"] > before["phases"][name]["seconds"] > 0, name


def test_a_stage_checkpoint_carries_the_cost_of_its_evaluation(fit: Fit) -> None:
    whole, _ = fit("whole", callbacks=[CostReport()])
    path = Path(whole.log_dir) / "checkpoints" / "stage-1-first.ckpt"
    resumed, _ = fit("resumed", callbacks=[CostReport()], ckpt_path=path)
    assert counts(cost_of(resumed)) == counts(cost_of(whole))


def test_a_second_fit_begins_anew(fit: Fit, model_dir: Path) -> None:
    module, cost = make_module(model_dir), CostReport()
    first, _ = fit("first", module=module, callbacks=[cost])
    second, _ = fit("second", module=module, data=make_data(("only",)), callbacks=[cost])
    assert cost_of(second)["optimizer_steps"] == 3
    assert (
        cost_of(second)["phases"]["score"]["tokens"] < cost_of(first)["phases"]["score"]["tokens"]
    )
