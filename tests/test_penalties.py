"""Penalties: their value, their gradient, what EWC protects, and when the gradient is added."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_method, make_model, make_module, make_task
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import PreTrainedModel

from sdft.callbacks import Retention
from sdft.fisher import diagonal_fisher
from sdft.methods import SFTModule
from sdft.penalties import EWC, L2ToStart, Penalty, Quadratic

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]
State = dict[str, Tensor]


def attached(kind: str, strength: float = 0.7, model: PreTrainedModel | None = None) -> Quadratic:
    """A penalty at a model's weights; EWC with a Fisher of random numbers."""
    penalty = L2ToStart(strength) if kind == "l2" else EWC(strength)
    penalty.attach(model or make_model())
    if isinstance(penalty, EWC):
        torch.manual_seed(1)
        for buffer in penalty.fisher.buffers():
            buffer.copy_(torch.rand_like(buffer))
    return penalty


def shifted(model: PreTrainedModel, seed: int = 2, size: float = 0.1) -> PreTrainedModel:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def general() -> list[Any]:
    return [make_task("any", train=5)]


def stream(**options: Any) -> Any:
    return make_data(**{"general": general()} | options)


def copied(module: torch.nn.Module) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- value and gradient


@pytest.mark.parametrize("kind", ["l2", "ewc"])
def test_nothing_at_the_centre(kind: str) -> None:
    model = make_model()
    penalty = attached(kind, model=model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.3)
    assert penalty.add_gradient(model).item() == 0.0
    assert all(torch.equal(p.grad, torch.full_like(p, 0.3)) for p in model.parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["l2", "ewc"])
def test_the_gradient_is_autograds_of_the_formula_and_joins_the_losss(kind: str) -> None:
    model = make_model()
    penalty = attached(kind, strength=0.7, model=model)
    centre = copied(model)
    shifted(model)
    formula = torch.zeros(())
    for name, parameter in model.named_parameters():
        weight = penalty.fisher[name] if isinstance(penalty, EWC) else 1.0
        formula = formula + 0.7 / 2 * (weight * (parameter - centre[name]) ** 2).sum()
    expected = torch.autograd.grad(formula, list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.3)
    next(model.parameters()).grad = None
    found = penalty.add_gradient(model)
    torch.testing.assert_close(found, formula.detach())
    assert found > 0
    for place, (parameter, gradient) in enumerate(zip(model.parameters(), expected, strict=True)):
        torch.testing.assert_close(parameter.grad, gradient + (0.3 if place else 0.0))


def test_it_grows_with_the_strength_and_the_square_of_the_distance() -> None:
    near, far = shifted(make_model(), size=0.1), shifted(make_model(), size=0.2)
    for kind in ("l2", "ewc"):
        once, twice = attached(kind, 1.0), attached(kind, 2.0)
        value = once.add_gradient(near)
        torch.testing.assert_close(twice.add_gradient(near), 2 * value)
        torch.testing.assert_close(once.add_gradient(far), 4 * value, rtol=1e-4, atol=0)


def test_ewc_grows_with_the_fisher() -> None:
    model = shifted(make_model())
    penalty = attached("ewc")
    assert isinstance(penalty, EWC)
    value = penalty.add_gradient(model)
    for buffer in penalty.fisher.buffers():
        buffer.mul_(3.0)
    torch.testing.assert_close(penalty.add_gradient(model), 3 * value)


def test_moves_along_directions_of_high_fisher_cost_more() -> None:
    costs = []
    for largest in (True, False):
        model = make_model()
        penalty = attached("ewc", model=model)
        assert isinstance(penalty, EWC)
        name, parameter = next(iter(model.named_parameters()))
        order = penalty.fisher[name].flatten().argsort(descending=largest)
        with torch.no_grad():
            parameter.view(-1)[order[:5]] += 0.1
        costs.append(float(penalty.add_gradient(model)))
        gradient = parameter.grad
        assert gradient is not None
        assert set(gradient.flatten().nonzero().flatten().tolist()) == set(order[:5].tolist())
    assert costs[0] > 10 * costs[1]


def test_half_precision_weights_are_compared_in_fp32() -> None:
    model = make_model().to(torch.bfloat16)
    penalty = attached("l2", 1.0, model)
    assert {buffer.dtype for buffer in penalty.buffers()} == {torch.float32}
    assert penalty.add_gradient(model).item() == 0.0
    start = copied(model)
    shifted(model)
    pairs = [(p.float(), start[name].float()) for name, p in model.named_parameters()]
    expected = sum(((a - b) ** 2).sum() for a, b in pairs) / 2
    torch.testing.assert_close(penalty.add_gradient(model), expected.detach())  # type: ignore[union-attr]


def test_frozen_and_tied_weights() -> None:
    model = make_model(tie_word_embeddings=True)
    model.model.layers[0].requires_grad_(False)
    penalty = attached("ewc", model=model)
    shifted(model)
    penalty.add_gradient(model)
    assert all(p.grad is None for p in model.model.layers[0].parameters())
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(list(penalty.centre.buffers())) == len(found)
    assert "model.embed_tokens.weight" in found


# ---------------------------------------------------------------- within a run


class Steps(Callback):
    """What the penalty added at each optimizer step, and the weights after it."""

    def __init__(self) -> None:
        self.added: list[State] = []
        self.weights: list[State] = []
        self.penalties: list[State] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        penalty, original = pl_module.penalty, pl_module.penalty.add_gradient

        def spy(student: PreTrainedModel) -> Tensor:
            grads = {n: p.grad.clone() for n, p in student.named_parameters()}  # type: ignore[union-attr]
            value = original(student)
            self.added.append({n: p.grad - grads[n] for n, p in student.named_parameters()})
            self.weights.append(copied(student))
            self.penalties.append(copied(penalty))
            return value

        penalty.add_gradient = spy


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def run(fit: Fit, folder: Path, penalty: Penalty | None, **options: Any) -> Any:
    data = stream(**options.pop("data", {}))
    settings = {"optimizer": sgd} | options.pop("module", {})
    return fit(
        module=make_method(SFTModule, folder, penalty=penalty, **settings), data=data, **options
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_is_added_once_per_optimizer_step(
    fit: Fit, model_dir: Path, accumulate: int
) -> None:
    steps = Steps()
    start = copied(make_model())
    run(
        fit,
        model_dir,
        L2ToStart(0.5),
        callbacks=[steps],
        accumulate_grad_batches=accumulate,
    )
    assert len(steps.added) == 6
    for added, weights in zip(steps.added, steps.weights, strict=True):
        for name, value in added.items():
            expected = 0.5 * (weights[name] - start[name])
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-4)
    assert max(float(value.abs().max()) for value in steps.added[-1].values()) > 1e-3


@pytest.mark.parametrize("penalty", [lambda: L2ToStart(2.0), lambda: EWC(2.0, examples=2)])
def test_accumulation_changes_nothing_but_the_number_of_batches(
    fit: Fit, model_dir: Path, penalty: Any
) -> None:
    """Batches of 6, or the same rows in two batches of 3."""
    found = []
    for size, accumulate in ((6, 1), (3, 2)):
        data = {"batch_size": size, "steps": 4}
        trained = run(fit, model_dir, penalty(), data=data, accumulate_grad_batches=accumulate)
        found.append(copied(trained[1]))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-3)


def test_it_is_added_before_clipping(fit: Fit, model_dir: Path) -> None:
    steps = Steps()
    run(
        fit,
        model_dir,
        L2ToStart(1e6),
        module={"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0)},
        callbacks=[steps],
        gradient_clip_val=0.05,
    )
    for before, after in zip(steps.weights, steps.weights[1:], strict=False):
        distance = sum(float((after[name] - before[name]).square().sum()) for name in before)
        assert math.sqrt(distance) < 0.051


@pytest.mark.parametrize("penalty", [lambda: L2ToStart(0.0), lambda: EWC(0.0, examples=2)])
def test_without_strength_a_run_is_one_without_penalty(
    fit: Fit, gpt2_dir: Path, penalty: Any
) -> None:
    """Estimating a Fisher changes neither the dropout nor the rollouts that follow."""
    found = []
    for given in (None, penalty()):
        module = make_module(gpt2_dir, penalty=given)
        found.append(copied(fit(module=module, data=stream())[1].student))
    assert same(*found)


@pytest.mark.parametrize(
    ("kind", "strengths"), [(L2ToStart, (0.0, 1.0, 5.0)), (EWC, (0.0, 0.4, 1.0))]
)
def test_the_stronger_the_nearer(
    fit: Fit, model_dir: Path, kind: Any, strengths: tuple[float, ...]
) -> None:
    """Near by the penalty's own measure: the Fisher's, or Euclid's."""
    distances = []
    for strength in strengths:
        data = {"steps": 10}
        _, module = run(fit, model_dir, kind(strength), data=data, max_epochs=1)
        module.penalty.strength = 2.0
        distances.append(float(module.penalty.add_gradient(module.student)))
    assert distances[0] > 1.05 * distances[1] > 1.1 * distances[2] > 0


def test_the_penalty_is_logged_and_named_in_the_report(fit: Fit, model_dir: Path) -> None:
    trainer, _ = run(fit, model_dir, L2ToStart(0.5))
    events = EventAccumulator(str(trainer.log_dir)).Reload().Scalars("train/penalty")
    assert events[0].value == 0.0
    assert events[-1].value > 0
    report = json.loads((Path(trainer.log_dir) / "retention.json").read_text())
    assert report["method"] == "sft+l2"


# ---------------------------------------------------------------- what EWC protects


def test_the_fisher_is_online_and_the_centre_the_newest_weights(
    fit: Fit, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fishers: list[State] = []
    prompts: list[list[list[int]]] = []

    def spy(module: Any, chosen: Any, seed: int) -> State:
        prompts.append(list(chosen))
        fishers.append(diagonal_fisher(module, chosen, seed))
        return fishers[-1]

    monkeypatch.setattr("sdft.penalties.diagonal_fisher", spy)
    steps = Steps()
    penalty = EWC(2.0, examples=3, gamma=0.25)
    data = {"general": [make_task("any", train=8)], "steps": 3}
    _, module = run(fit, model_dir, penalty, data=data, callbacks=[steps])
    stream_ = module.trainer.datamodule
    assert [len(chosen) for chosen in prompts] == [3, 3], "of the base and of the first stage"
    anywhere = [item.student_ids for item in stream_.general_prompts()]
    own = [item.student_ids for item in stream_.encoded(stream_.tasks[0], "train")]
    assert all(ids in anywhere for ids in prompts[0])
    assert all(ids in own for ids in prompts[1])
    base = copied(make_model())
    for step, found in enumerate(steps.penalties):
        stage = step // 3
        centre = base if stage == 0 else steps.weights[3]
        for name, fisher in fishers[0].items():
            key = name.replace(".", "/")
            expected = fisher if stage == 0 else 0.25 * fisher + fishers[1][name]
            assert torch.equal(found[f"fisher.{key}"], expected)
            assert torch.equal(found[f"centre.{key}"], centre[name])
    assert all(float(value.abs().max()) == 0.0 for value in steps.added[3].values())
    assert any(float(value.abs().max()) > 0.0 for value in steps.added[4].values())


def test_without_the_base_the_first_stage_is_free(fit: Fit, model_dir: Path) -> None:
    free = run(fit, model_dir, None, max_epochs=1)
    data = {"general": []}
    held = run(fit, model_dir, EWC(9.0, protect_base=False), data=data, max_epochs=1)
    assert same(copied(held[1].student), copied(free[1].student))
    steps = Steps()
    run(fit, model_dir, EWC(9.0, protect_base=False), data=data, callbacks=[steps])
    assert all(float(v.abs().max()) == 0.0 for added in steps.added[:3] for v in added.values())
    assert any(float(v.abs().max()) > 0.0 for v in steps.added[-1].values())


def test_with_a_model_per_task_only_the_base_is_protected(fit: Fit, model_dir: Path) -> None:
    steps = Steps()
    data = {"from_base_each_task": True}
    run(fit, model_dir, EWC(9.0, examples=2), data=data, callbacks=[steps])
    assert all(same(found, steps.penalties[0]) for found in steps.penalties)
    base = copied(make_model())
    for stage in (0, 1):
        assert same({n: steps.weights[3 * stage][n] for n in base}, base)


def test_general_prompts_are_asked_for_before_anything_trains(fit: Fit, model_dir: Path) -> None:
    module = make_method(SFTModule, model_dir, penalty=EWC(1.0))
    with pytest.raises(ValueError, match=r"protect_base.*data\.general.*protect_base to false"):
        fit(module=module, data=make_data())
    assert module.trainer.global_step == 0
    retention = next(c for c in module.trainer.callbacks if isinstance(c, Retention))  # type: ignore[attr-defined]
    assert not retention.rows, "the base row takes minutes: it comes later"


# ---------------------------------------------------------------- precision and checkpoints


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_runs_buffers_are_fp32(fit: Fit, model_dir: Path, precision: str) -> None:
    steps = Steps()
    run(fit, model_dir, EWC(1.0, examples=2), precision=precision, callbacks=[steps])
    for found in steps.penalties:
        assert {value.dtype for value in found.values()} == {torch.float32}
    for name, value in steps.weights[0].items():
        key = f"centre.{name.replace('.', '/')}"
        assert torch.equal(steps.penalties[0][key], value.float()), "the start, as it was rounded"
    rounded = [v.bfloat16().float() for k, v in steps.penalties[-1].items() if "fisher" in k]
    exact = [v for k, v in steps.penalties[-1].items() if "fisher" in k]
    assert any(not torch.equal(a, b) for a, b in zip(rounded, exact, strict=True))


def test_evaluation_needs_no_penalty(fit: Fit, model_dir: Path, tmp_path: Path) -> None:
    trainer, trained = run(fit, model_dir, EWC(1.0, examples=2))
    checkpoint = Path(trainer.log_dir) / "checkpoints" / "last.ckpt"
    names = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in names} == {"student", "penalty"}
    for penalty in (EWC(1.0), None):
        module = make_method(SFTModule, model_dir, penalty=penalty)
        fresh = Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
        fresh.test(module, datamodule=stream(), ckpt_path=checkpoint, weights_only=True)
        assert {name.split(".")[0] for name in module.state_dict()} == {"student"}
        assert same(copied(module.student), copied(trained.student))


@pytest.mark.parametrize(
    ("saved", "resumed", "named"),
    [
        (None, L2ToStart(1.0), "the penalty 'none', this run's is 'l2'"),
        (L2ToStart(1.0), None, "the penalty 'l2', this run's is 'none'"),
        (L2ToStart(1.0), EWC(1.0), "the penalty 'l2', this run's is 'ewc'"),
    ],
)
def test_training_goes_on_with_its_own_penalty_only(
    fit: Fit, model_dir: Path, saved: Any, resumed: Any, named: str
) -> None:
    trainer, _ = run(fit, model_dir, saved, max_epochs=1)
    checkpoint = Path(trainer.log_dir) / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=named):
        run(fit, model_dir, resumed, ckpt_path=checkpoint)


# ---------------------------------------------------------------- bad values


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", [L2ToStart, EWC])
def test_a_bad_strength_is_named(kind: Any, strength: float) -> None:
    with pytest.raises(
        ValueError, match=f"{kind.__name__}: strength must be a number of 0 or more"
    ):
        kind(strength)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"examples": 0}, "EWC: examples must be at least 1, found 0"),
        ({"gamma": -0.1}, r"EWC: gamma must lie in \[0, 1\], found -0.1"),
        ({"gamma": 1.1}, r"EWC: gamma must lie in \[0, 1\], found 1.1"),
        ({"gamma": math.nan}, r"EWC: gamma must lie in \[0, 1\], found nan"),
    ],
)
def test_a_bad_number_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        EWC(1.0, **options)
