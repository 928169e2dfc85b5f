"""The horizon: a cap of the rollouts in training, on a ramp, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_data, make_module
from lightning.pytorch import Callback, Trainer

from sdft.cli import main
from sdft.horizon import Horizon, as_horizon
from sdft.rollout import Rollout, Sampling

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


@pytest.mark.parametrize(
    ("horizon", "expected"),
    [
        (Horizon(4, 10, 3), [4, 6, 8, 10, 10]),
        (Horizon(10, 4, 3), [10, 8, 6, 4, 4]),
        (Horizon(1, 4, 6), [1, 1, 2, 2, 3, 3, 4, 4]),
        (Horizon(5, 5, 1), [5, 5, 5]),
    ],
)
def test_the_ramp(horizon: Horizon, expected: list[int]) -> None:
    assert [horizon.at(step) for step in range(len(expected))] == expected
    assert horizon.at(10**6) == horizon.end
    assert horizon.longest == max(expected)


def test_a_number_stays() -> None:
    fixed = as_horizon(5, 6)
    assert fixed is not None
    assert [fixed.at(step) for step in (0, 1, 100)] == [5, 5, 5]
    assert as_horizon(None, 6) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "horizon must be at least 1, or unset, found 0"),
        (7, "horizon must not exceed max_new_tokens, 6, found 7"),
        ((2, 7, 3), "horizon must not exceed max_new_tokens, 6, found 7"),
        ((7, 2, 3), "horizon must not exceed max_new_tokens, 6, found 7"),
        ((0, 2, 3), "horizon.start must be at least 1, found 0"),
        ((1, 0, 3), "horizon.end must be at least 1, found 0"),
        ((1, 2, 0), "horizon.steps must be at least 1, found 0"),
    ],
    ids=str,
)
def test_a_number_out_of_range_is_named(model_dir: Path, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(model_dir, horizon=Horizon(*value) if isinstance(value, tuple) else value)


class Recorder(Callback):
    """What was asked of the engine in which phase, and what was logged."""

    def __init__(self) -> None:
        self.limits: dict[str, list[int]] = {}
        self.logged: list[dict[str, float]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        real = pl_module.engine.generate

        def generate(model: Any, prompts: Any, sampling: Sampling, *rest: Any) -> Rollout:
            phase = pl_module.phases.current
            self.limits.setdefault(phase, []).append(sampling.max_new_tokens)
            rollout: Rollout = real(model, prompts, sampling, *rest)
            return rollout

        pl_module.engine.generate = generate

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        keys = ("train/horizon", "train/truncated", "train/completion_length")
        values = trainer.callback_metrics
        self.logged.append({key: float(values[key]) for key in keys if key in values})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_caps_rollouts_begins_anew_in_each_stage_and_spares_evaluation(
    fit: Fit, model_dir: Path, accumulate: int
) -> None:
    seen = Recorder()
    module = make_module(model_dir, horizon=Horizon(2, 4, 2))
    data = make_data(steps=4)
    fit(module=module, data=data, callbacks=[seen], accumulate_grad_batches=accumulate)
    per_stage = [limit for limit in (2, 3, 4, 4) for _ in range(accumulate)]
    assert seen.limits["generate"] == per_stage * 2
    assert set(seen.limits["evaluate"]) == {6}
    assert set(seen.limits["track"]) == {6}, "samples are shown in full"
    assert [values["train/horizon"] for values in seen.logged] == per_stage * 2
    cut = [values for values in seen.logged if values["train/truncated"] == 1]
    assert len(cut) > 2, "a rollout that the horizon cuts counts as truncated"
    assert all(v["train/completion_length"] == v["train/horizon"] for v in cut)


def test_without_one_nothing_is_cut(fit: Fit, model_dir: Path) -> None:
    seen = Recorder()
    fit(module=make_module(model_dir), data=make_data(("only",)), callbacks=[seen])
    assert set(seen.limits["generate"]) == {6}
    assert not any("train/horizon" in values for values in seen.logged)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"start": 2, "end": 4, "steps": 2}),
        (["--model.horizon", "3"], 3),
        (["--model.horizon", "null"], None),
        (["--model.horizon.end", "6"], {"start": 2, "end": 6, "steps": 2}),
    ],
    ids=str,
)
def test_its_two_forms_in_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: Any
) -> None:
    ramp = {"horizon": {"start": 2, "end": 4, "steps": 2}}
    model = {"class_path": "sdft.SDFTModule", "init_args": ramp}
    (tmp_path / "ramp.yaml").write_text(yaml.safe_dump({"model": model}))
    base = "configs/seq_skills.yaml"
    config = str(tmp_path / "ramp.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", base, "-c", config, *flags, "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["horizon"] == expected
