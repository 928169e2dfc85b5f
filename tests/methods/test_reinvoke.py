"""SFT + re-invoke: supervised rows as in SFT, general prompts held to a base that never moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import echo_examples, make_data, make_method, make_task, sharpen
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from sdft.batch import Batch, Origin
from sdft.losses import sequence_mean, token_divergence
from sdft.methods import ReinvokeModule, SFTModule
from sdft.mixtures import GeneralPrompts, PastReplay, Reinvoke
from sdft.packing import completion_hidden
from sdft.rollout import Rollout
from sdft.schedule import StageSchedule
from sdft.weights import frozen_copy

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SFTModule, "_log_step", lambda *args: None)
    monkeypatch.setattr(ReinvokeModule, "_log_answers", lambda *args: None)


def build(folder: Path, **options: Any) -> ReinvokeModule:
    module = make_method(ReinvokeModule, folder, **options)
    module.configure_model()
    return module


def moved(module: ReinvokeModule) -> ReinvokeModule:
    """The student somewhere else than its base."""
    sharpen(module.model, 3.0)
    return module


def batch_of(module: ReinvokeModule, *origins: Origin) -> Batch:
    examples = echo_examples(len(origins))
    prompts = [module.encoder.student_ids(example) for example in examples]
    return Batch(examples, prompts, [[] for _ in origins], origins)


def stream(**options: Any) -> Any:
    settings: dict[str, Any] = {"steps": 5, "general": [make_task("any", train=5)]}
    return make_data(**settings | options)


class Watch(Callback):
    """The origins of every batch, the learning rates and the losses."""

    def __init__(self) -> None:
        self.origins: list[tuple[int, list[Origin]]] = []
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.origins.append((trainer.current_epoch, batch.origins))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any
    ) -> None:
        self.losses.append(float(outputs["loss"]))


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_no_loss_and_no_gradient_where_the_student_is_the_base(
    model_dir: Path, silent: None, alpha: float
) -> None:
    module = build(model_dir, alpha=alpha)
    loss = module.training_step(batch_of(module, *["general"] * 3), 0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert max(p.grad.abs().max() for p in module.model.parameters()) < 1e-5


def test_a_student_that_moved_is_pulled_back(model_dir: Path, silent: None) -> None:
    module = moved(build(model_dir))
    loss = module.training_step(batch_of(module, *["general"] * 3), 0)
    loss.backward()
    assert loss.item() > 1e-3
    assert all(p.grad is not None for p in module.model.parameters())
    assert all(p.grad is None for p in module.base.parameters())


def test_base_and_student_see_the_same_bare_prompt_and_answer(
    model_dir: Path, silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = moved(build(model_dir))
    batch = batch_of(module, "general", "general")
    sampled: list[Any] = []
    scored: list[Any] = []

    class Spy:
        def generate(self, model: Any, prompts: Any, *rest: Any) -> Rollout:
            sampled.append((model, prompts))
            ids = torch.tensor([[9, 10, 11]] * len(prompts))
            return Rollout(ids, torch.ones_like(ids).bool(), torch.zeros(len(prompts)).bool())

    def spy(model: Any, prompts: Any, completion: Rollout) -> Tensor:
        scored.append((model, prompts, completion.ids_BT.tolist()))
        return completion_hidden(model, prompts, completion)

    monkeypatch.setattr("sdft.respondent.completion_hidden", spy)
    module.engine = Spy()
    module.training_step(batch, 0)
    same = [[9, 10, 11]] * 2
    assert sampled == [(module.model, batch.student_ids)]
    assert scored == [
        (module.base, batch.student_ids, same),
        (module.model, batch.student_ids, same),
    ]


def test_the_divergence_in_full(model_dir: Path) -> None:
    module = build(model_dir, alpha=0.0, temperature=2.0, skip_first_tokens=1)
    torch.manual_seed(0)
    student, base = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    completion = Rollout(torch.zeros(2, 4).long(), mask, torch.zeros(2).bool())
    p, q = (base / 2).log_softmax(-1), (student / 2).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)  # KL(base ‖ student)
    expected = ((kl[0, 1] + kl[0, 2]) / 2 + kl[1, 1]) / 2
    torch.testing.assert_close(module.divergence(student, base, completion), expected)
    module.skip_first_tokens = 0
    everything = sequence_mean(token_divergence(student / 2, base / 2), mask)
    torch.testing.assert_close(module.divergence(student, base, completion), everything)


def test_nothing_is_skipped_by_default(model_dir: Path) -> None:
    assert build(model_dir).skip_first_tokens == 0


def test_a_mixed_batch_is_the_mean_over_its_rows(model_dir: Path, silent: None) -> None:
    module = moved(build(model_dir))
    batch = batch_of(module, "new", "general", "past", "general", "new")
    torch.manual_seed(3)
    loss = module.training_step(batch, 0)
    torch.manual_seed(3)
    general = module.reinvoke(batch.of("general"))
    supervised = module.supervised(batch.of("new", "past"))
    torch.testing.assert_close(loss, (3 * supervised + 2 * general) / 5)
    sft = make_method(SFTModule, model_dir)
    sft.student = module.student
    rows = [row for row, origin in enumerate(batch.origins) if origin != "general"]
    torch.testing.assert_close(supervised, sft.training_step(batch.rows(rows), 0))


# ---------------------------------------------------------------- whole runs


def test_supervised_first_then_general_and_the_schedule_begins_again(
    fit: Fit, model_dir: Path
) -> None:
    watch = Watch()
    module = make_method(
        ReinvokeModule, model_dir, scheduler=lambda o: StageSchedule(o, warmup_steps=0)
    )
    trainer, _ = fit(module=module, data=stream(mixtures=[Reinvoke(0.4)]), callbacks=[watch])
    assert trainer.global_step == 10, "as many steps as without the mixture"
    kinds = [(stage, *set(origins)) for stage, origins in watch.origins]
    expected = ["new"] * 3 + ["general"] * 2
    assert kinds == [(stage, kind) for stage in (0, 1) for kind in expected]
    cosine = [[0.5 * (1 + math.cos(math.pi * i / n)) for i in range(n)] for n in (3, 2)]
    assert watch.rates == pytest.approx([1e-2 * r for r in (cosine[0] + cosine[1]) * 2])


def test_the_base_never_moves(fit: Fit, model_dir: Path) -> None:
    expected = state(frozen_copy(make_method(ReinvokeModule, model_dir).model))
    mixtures = [PastReplay(0.5), Reinvoke(0.4)]
    _, module = fit(
        module=make_method(ReinvokeModule, model_dir, track_base=False),
        data=stream(mixtures=mixtures),
    )
    assert module.base is not None
    found = state(module.base)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    trained = state(module.model)
    assert any(not torch.equal(value, expected[name]) for name, value in trained.items())
    assert {name.split(".")[0] for name in module.state_dict()} == {"student"}


def test_re_invoking_brings_the_student_back(fit: Fit, model_dir: Path) -> None:
    watch = Watch()
    data = stream(steps=60, mixtures=[Reinvoke(0.7)])
    fit(module=make_method(ReinvokeModule, model_dir), data=data, callbacks=[watch])
    general = [
        loss
        for (stage, origins), loss in zip(watch.origins, watch.losses, strict=True)
        if stage == 0 and origins[0] == "general"
    ]
    assert general[-1] < 0.3 * general[0]


def test_general_prompts_may_join_every_batch(fit: Fit, model_dir: Path) -> None:
    watch = Watch()
    trainer, _ = fit(
        module=make_method(ReinvokeModule, model_dir),
        data=stream(mixtures=[GeneralPrompts(0.5)]),
        callbacks=[watch],
    )
    assert trainer.global_step == 10
    assert {origin for _, origins in watch.origins for origin in origins} == {"new", "general"}
    logged = trainer.callback_metrics
    assert logged["reinvoke/divergence"] > 0
    assert logged["train/loss"] > 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha", -0.1),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("skip_first_tokens", -1),
    ],
)
def test_a_number_out_of_range_is_named(model_dir: Path, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        make_method(ReinvokeModule, model_dir, **{key: value})
