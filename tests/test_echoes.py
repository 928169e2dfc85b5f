"""Tokens that a wrong demonstration explains as well are masked, the same on every path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import echo_examples, make_data, make_method, make_module, sharpen
from lightning.pytorch import Trainer
from test_module import batch_of
from torch import Tensor

from sdft import Example, SDFTModule, StudentModule
from sdft.batch import Batch
from sdft.callbacks import Guard
from sdft.echoes import WrongDemonstrations
from sdft.hidden_loss import HiddenLoss
from sdft.logits_loss import LogitsLoss
from sdft.losses import sequence_mean, token_divergence
from sdft.methods import AnchorReplayModule
from sdft.mixtures import PastReplay
from sdft.rollout import Rollout

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., tuple[Trainer, StudentModule]]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SDFTModule, "_log_step", lambda *args: None)


def build(
    folder: Path, share: float | None, kind: type[SDFTModule] = SDFTModule, **options: Any
) -> Any:
    """A module whose teacher differs from its student."""
    module = make_method(kind, folder, **{"skip_first_tokens": 0, "mask_echoes": share} | options)
    module.configure_model()
    sharpen(module.model, 2.0)
    assert module.teacher is not None
    sharpen(module.teacher, 3.0)
    return module


def with_wrong(module: SDFTModule, batch: Batch) -> Batch:
    tasks = {"only": batch.examples}
    module.wrong = WrongDemonstrations(module.encoder, tasks, limit=100, seed=0)  # type: ignore[misc]
    return batch


def by_hand(module: SDFTModule, batch: Batch, completion: Rollout) -> tuple[Tensor, Tensor]:
    """The masked loss from whole logits, and which tokens are echoes."""
    by = module.sampling.temperature
    wrong, seen = module.wrong_demonstrations(batch)
    with torch.no_grad():
        right_BTV = module.score(batch, completion) / by
        wrong_BTV = module.score(wrong, completion) / by
    student_BTV = module.student_logits(batch, completion) / by
    apart_BT = token_divergence(wrong_BTV, right_BTV)
    taught_BT = token_divergence(student_BTV, right_BTV)
    assert module.mask_echoes is not None
    echoes_BT = (apart_BT < module.mask_echoes * taught_BT) & torch.tensor(seen)[:, None]
    loss_BT = token_divergence(student_BTV, right_BTV, module.alpha)
    mask_BT = module.loss_mask(completion)
    return sequence_mean(loss_BT * ~echoes_BT, mask_BT), echoes_BT & mask_BT


def gradients(module: SDFTModule, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in module.model.named_parameters()}
    return {name: value.clone() for name, value in found.items() if value is not None}


SETTINGS: list[dict[str, Any]] = [
    {},
    {"alpha": 0.5, "temperature": 0.7, "skip_first_tokens": 1},
    {"alpha": 1.0, "micro_batch_tokens": 30},
    {"micro_batch_tokens": 1},
]


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("way", [HiddenLoss, LogitsLoss])
def test_the_loss_is_the_one_by_hand(
    way: type[Any], options: dict[str, Any], model_dir: Path, silent: None
) -> None:
    module = build(model_dir, 0.4, **options)
    batch = with_wrong(module, batch_of(module, 5))
    torch.manual_seed(0)
    completion = module.rollout(batch)
    wanted, echoes_BT = by_hand(module, batch, completion)
    assert 0 < echoes_BT.sum() < module.loss_mask(completion).sum(), "some, and not all"
    expected = gradients(module, wanted)
    compared = way(module, batch, completion)
    compared.score()
    loss = compared.loss()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    found = gradients(module, loss)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name
    counted, masked = compared.echoes.tolist()
    assert (counted, masked) == (module.loss_mask(completion).sum(), echoes_BT.sum())


def test_where_the_demonstration_says_nothing_all_is_echo(model_dir: Path, silent: None) -> None:
    """A teacher that does not look at what the demonstration says teaches its form alone."""
    module = build(model_dir, 1.0)
    batch = with_wrong(module, batch_of(module, 4))
    # Tell the wrong prompts from the right ones, but not by what the model would read.
    same = [list(ids) for ids in batch.teacher_ids]
    module.wrong.batch = lambda b, o: (  # type: ignore[method-assign]
        Batch(b.examples, b.student_ids, same),
        [True] * len(b),
    )
    loss = module.training_step(batch, 0)
    assert loss.item() == 0.0
    assert all(not value.any() for value in gradients(module, loss).values())


def test_rows_without_a_wrong_demonstration_are_left_as_they_are(
    model_dir: Path, silent: None
) -> None:
    module, plain = build(model_dir, 1.0), build(model_dir, None)
    batch = batch_of(module, 4)
    strangers = {"other": echo_examples(4, offset=20)}
    module.wrong = WrongDemonstrations(module.encoder, strangers, 100, 0)
    losses = []
    for one in (module, plain):
        torch.manual_seed(0)
        losses.append(one.training_step(batch, 0).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_loss_of_ones_own_gets_the_mask(model_dir: Path, silent: None) -> None:
    seen: list[Tensor] = []

    class Own(SDFTModule):
        def loss(self, student: Tensor, teacher: Tensor, mask_BT: Tensor) -> Tensor:
            seen.append(mask_BT)
            return super().loss(student, teacher, mask_BT)

    module = build(model_dir, 0.4, Own)
    assert not module.compares_hidden
    batch = with_wrong(module, batch_of(module, 5))
    torch.manual_seed(0)
    completion = module.rollout(batch)
    _, echoes_BT = by_hand(module, batch, completion)
    torch.manual_seed(0)
    module.training_step(batch, 0)
    assert torch.equal(seen[0], module.loss_mask(completion) & ~echoes_BT)


def test_one_more_pass_of_the_teacher_and_only_when_on(
    model_dir: Path, silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = {}
    for share in (None, 0.5):
        module = build(model_dir, share)
        batch = with_wrong(module, batch_of(module, 4))
        models: list[Any] = []
        hidden = SDFTModule.hidden
        monkeypatch.setattr(
            SDFTModule, "hidden", lambda s, m, *a, h=hidden, f=models: f.append(m) or h(s, m, *a)
        )
        module.training_step(batch, 0)
        monkeypatch.setattr(SDFTModule, "hidden", hidden)
        passes[share] = [sum(m is one for m in models) for one in (module.model, module.teacher)]
    assert passes == {None: [1, 1], 0.5: [1, 2]}


@pytest.mark.parametrize(
    ("kind", "options", "run"),
    [
        (SDFTModule, {"updates_per_generation": 2}, {"accumulate_grad_batches": 2}),
        (AnchorReplayModule, {}, {"mixtures": [PastReplay(0.5)]}),
    ],
)
def test_a_whole_run(
    kind: type[SDFTModule], options: dict[str, Any], run: dict[str, Any], fit: Fit, model_dir: Path
) -> None:
    """Past rows that an anchor grades without a demonstration have no echoes."""
    echoes: list[tuple[Batch, Tensor]] = []

    class Told(kind):  # type: ignore[valid-type, misc]
        def wrong_demonstrations(self, batch: Batch) -> tuple[Batch, list[bool]]:
            wrong, seen = super().wrong_demonstrations(batch)
            echoes.append((batch, torch.tensor(seen)))
            return wrong, seen

    mixtures = run.pop("mixtures", [])
    module = make_method(Told, model_dir, mask_echoes=0.5, skip_first_tokens=0, **options)
    data = make_data(mixtures=mixtures)
    trainer, _ = fit(module=module, data=data, callbacks=[Guard()], **run)
    assert 0.0 <= float(trainer.callback_metrics["train/echoes"]) <= 1.0
    for batch, seen_B in echoes:
        allowed = [origin in kind.demonstrated for origin in batch.origins]
        assert seen_B.tolist() == allowed


# ---------------------------------------------------------------- wrong demonstrations


def test_they_are_anothers_and_the_prompt_is_ones_own(model_dir: Path) -> None:
    module = make_module(model_dir)
    examples = echo_examples(8)
    for seed in range(3):
        wrong = WrongDemonstrations(module.encoder, {"a": examples}, 100, seed)
        for example in examples:
            ids = wrong.prompt(example)
            assert ids is not None
            others = [
                module.encoder.teacher_ids(replace(example, demonstration=other.demonstration))
                for other in examples
                if other.demonstration != example.demonstration
            ]
            assert ids in others
            assert ids == WrongDemonstrations(module.encoder, {"a": examples}, 100, seed).prompt(
                example
            )


def test_a_prompt_that_does_not_fit_is_not_taken(model_dir: Path) -> None:
    module = make_module(model_dir)
    short = echo_examples(4)
    long = [replace(e, demonstration=" ".join("abcdefgh")) for e in echo_examples(40, offset=4)]
    limit = max(len(module.encoder.teacher_ids(example)) for example in short)
    wrong = WrongDemonstrations(module.encoder, {"a": [*short, *long]}, limit, 0)
    for example in short:
        ids = wrong.prompt(example)
        assert ids is None or len(ids) <= limit
    assert wrong.prompt(long[0]) is not None, "a short one instead of its own"


def test_a_context_is_part_of_what_is_shown(model_dir: Path) -> None:
    module = make_module(model_dir, teacher_template="{prompt} {context} shown {demonstration}")
    examples = [replace(e, context=e.answer, demonstration="a") for e in echo_examples(4)]
    wrong = WrongDemonstrations(module.encoder, {"a": examples}, 100, 0)
    found = wrong.prompt(examples[0])
    assert found is not None
    assert found != module.encoder.teacher_ids(examples[0])


def test_a_task_with_one_demonstration_is_refused(fit: Fit, model_dir: Path) -> None:
    same = [Example(e.messages, "a", demonstration="a") for e in echo_examples(4)]
    module = make_module(model_dir, mask_echoes=0.5)
    data = make_data(("only",))
    data.tasks[0]._examples["train"] = same  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="needs two different demonstrations in every task, task"):
        fit(module=module, data=data)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_out_of_range(model_dir: Path, share: float) -> None:
    with pytest.raises(ValueError, match=r"mask_echoes must lie in \(0, 1\]"):
        make_module(model_dir, mask_echoes=share)
