"""One step of SDFT: rollout, scoring, divergence, and where the gradient goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import echo_examples, make_data, make_method, make_module, save_model, sharpen
from lightning.pytorch import Callback, Trainer
from torch import Tensor

import sdft.respondent
from sdft import SDFTModule
from sdft.batch import Batch
from sdft.callbacks import EMATeacher
from sdft.losses import sequence_mean, token_divergence
from sdft.rollout import Rollout

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step outside a trainer has nowhere to log."""
    monkeypatch.setattr(SDFTModule, "_log_step", lambda *args: None)


def build(folder: Path, kind: type[SDFTModule] = SDFTModule, **options: Any) -> SDFTModule:
    module = make_method(kind, folder, **{"skip_first_tokens": 1} | options)
    module.configure_model()
    return module


def batch_of(module: SDFTModule, count: int = 3) -> Batch:
    examples = echo_examples(count)
    return Batch(
        examples,
        [module.encoder.student_ids(example) for example in examples],
        [module.encoder.teacher_ids(example) for example in examples],
    )


# ---------------------------------------------------------------- the step


def test_no_loss_and_no_gradient_when_teacher_and_student_see_the_same(
    model_dir: Path, silent: None
) -> None:
    module = build(model_dir, skip_first_tokens=0)
    batch = batch_of(module)
    batch.teacher_ids = batch.student_ids
    loss = module.training_step(batch, 0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert module.student is not None
    assert max(p.grad.abs().max() for p in module.student.parameters()) < 1e-5  # type: ignore[union-attr]


def test_the_gradient_reaches_all_of_the_student_and_nothing_else(
    model_dir: Path, silent: None
) -> None:
    module = build(model_dir, skip_first_tokens=0)
    loss = module.training_step(batch_of(module), 0)
    loss.backward()
    assert loss.item() > 0
    assert module.student is not None
    assert module.teacher is not None
    for name, parameter in module.student.named_parameters():
        assert parameter.grad is not None, name
    assert any(p.grad.abs().max() > 0 for p in module.student.parameters())  # type: ignore[union-attr]
    assert all(p.grad is None for p in module.teacher.parameters())


class WholeLogits(SDFTModule):
    """A loss of its own, which is the plain one: the way of custom losses."""

    def loss(
        self, student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, mask_BT: Tensor
    ) -> Tensor:
        return super().loss(student_logits_BTV, teacher_logits_BTV, mask_BT)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_hidden_states_and_whole_logits_give_one_loss_and_one_gradient(
    tmp_path: Path, silent: None, family: str, alpha: float
) -> None:
    folder = save_model(tmp_path, family=family)
    found: list[tuple[float, list[Tensor]]] = []
    for kind in (SDFTModule, WholeLogits):
        module = build(folder, kind, alpha=alpha, temperature=0.7, skip_first_tokens=1)
        assert module.teacher is not None
        with torch.no_grad():
            for parameter in module.teacher.parameters():
                parameter.mul_(1.5)  # so that the two differ
        assert module.student is not None
        module.student.eval()  # GPT-2 has dropout
        assert module.compares_hidden == (kind is SDFTModule)
        torch.manual_seed(0)
        loss = module.training_step(batch_of(module, count=5), 0)
        loss.backward()
        found.append((loss.item(), [p.grad for p in module.student.parameters()]))  # type: ignore[misc]
    (hidden, ours), (whole, theirs) = found
    assert whole > 0
    assert hidden == pytest.approx(whole, rel=1e-3, abs=1e-6)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "function"),
    [(SDFTModule, "completion_hidden"), (WholeLogits, "completion_logits")],
)
def test_the_student_answers_without_and_the_teacher_judges_with_the_demonstration(
    model_dir: Path,
    silent: None,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[SDFTModule],
    function: str,
) -> None:
    module = build(model_dir, kind)
    batch = batch_of(module)
    generated: list[Any] = []

    class Spy:
        def generate(self, model: Any, prompts: Any, *rest: Any) -> Rollout:
            generated.append((model, prompts))
            ids = torch.tensor([[9, 10, 11]] * len(prompts))
            return Rollout(ids, torch.ones_like(ids).bool(), torch.zeros(len(prompts)).bool())

    scored: list[Any] = []

    real = getattr(sdft.respondent, function)

    def spy(model: Any, prompts: Any, completion: Rollout, *rest: Any) -> Tensor:
        scored.append((model, prompts, completion.ids_BT.tolist()))
        result: Tensor = real(model, prompts, completion, *rest)
        return result

    monkeypatch.setattr(sdft.respondent, function, spy)
    module.engine = Spy()
    module.training_step(batch, 0)
    assert generated == [(module.student, batch.student_ids)]
    same = [[9, 10, 11]] * 3
    assert scored == [
        (module.teacher, batch.teacher_ids, same),
        (module.student, batch.student_ids, same),
    ]


def test_the_loss_in_full(model_dir: Path) -> None:
    module = build(model_dir, alpha=0.5, temperature=2.0, skip_first_tokens=1)
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    completion = Rollout(torch.zeros(2, 4).long(), mask, torch.zeros(2).bool())
    found = module.loss(student, teacher, module.loss_mask(completion))
    per_token = token_divergence(student / 2.0, teacher / 2.0, 0.5)
    expected = ((per_token[0, 1] + per_token[0, 2]) / 2 + per_token[1, 1]) / 2
    torch.testing.assert_close(found, expected)
    untempered = sequence_mean(
        token_divergence(student, teacher, 0.5), module.loss_mask(completion)
    )
    assert not torch.isclose(found, untempered)


@pytest.mark.parametrize("skip", [0, 1, 3, 9])
def test_skipped_tokens_are_masked_in_the_loss_only(model_dir: Path, skip: int) -> None:
    module = make_module(model_dir, skip_first_tokens=skip)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    completion = Rollout(torch.zeros(2, 5).long(), mask, torch.zeros(2).bool())
    assert module.loss_mask(completion).sum(-1).tolist() == [max(0, 5 - skip), max(0, 2 - skip)]
    assert completion.lengths_B.tolist() == [5, 2]


def test_a_batch_with_only_skipped_tokens_trains_on(model_dir: Path, silent: None) -> None:
    module = build(model_dir, skip_first_tokens=50)
    loss = module.training_step(batch_of(module), 0)
    loss.backward()
    assert loss.item() == 0.0


def test_several_rollouts_per_prompt(model_dir: Path, silent: None) -> None:
    module = build(model_dir, rollouts_per_prompt=3)
    sharpen(module.model, 6.0)
    seen: list[Rollout] = []
    module.rollout = lambda batch: seen.append(SDFTModule.rollout(module, batch)) or seen[-1]  # type: ignore[method-assign, assignment, func-returns-value]
    module.training_step(batch_of(module, 2), 0)
    assert len(seen[0].ids_BT) == 6
    assert len({tuple(ids) for ids in seen[0].completions()[:3]}) > 1


def test_hand_made_copies_are_fp32_frozen_and_apart(model_dir: Path) -> None:
    module = build(model_dir, dtype="bfloat16")
    assert module.student is not None
    assert {p.dtype for p in module.student.parameters()} == {torch.bfloat16}
    for copy in (module.teacher, module.base):
        assert copy is not None
        assert {p.dtype for p in copy.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in copy.parameters())
        pairs = zip(copy.parameters(), module.student.parameters(), strict=True)
        assert all(torch.equal(a, b.float()) and a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_the_base_is_neither_saved_nor_optimised(model_dir: Path) -> None:
    module = build(model_dir)
    assert {name.split(".")[0] for name in module.state_dict()} == {"student", "teacher"}
    without = build(model_dir, track_base=False)
    assert without.base is None


# ---------------------------------------------------------------- whole runs


def student_of(trained: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trained[1].student.state_dict().items()}


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


def test_looking_changes_nothing(fit: Fit, model_dir: Path) -> None:
    """Neither logging nor the base nor evaluation has a part in what is learnt."""
    plain = student_of(fit())
    bare = fit(
        module=make_module(model_dir, track_base=False),
        log_every_n_steps=50,
        limit_val_batches=0,
    )
    assert not differ(plain, student_of(bare))


def test_gradient_checkpointing_learns_the_same(fit: Fit, model_dir: Path) -> None:
    plain = student_of(fit())
    checkpointed = student_of(fit(module=make_module(model_dir, gradient_checkpointing=True)))
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.0},
        {"alpha": 0.5},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.5},
        {"skip_first_tokens": 0},
        {"rollouts_per_prompt": 2},
    ],
    ids=str,
)
def test_every_setting_matters(fit: Fit, model_dir: Path, options: dict[str, Any]) -> None:
    one_stage = {"data": make_data(("only",)), "max_epochs": 1}
    plain = student_of(fit(**one_stage))
    assert differ(plain, student_of(fit(module=make_module(model_dir, **options), **one_stage)))


def test_dropout_is_on_in_training_and_off_in_evaluation(
    fit: Fit, gpt2_dir: Path, tmp_path: Path
) -> None:
    modes: set[tuple[str, bool]] = set()

    class Watch(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            inner = pl_module.student.transformer.h[0].attn.resid_dropout
            inner.register_forward_hook(
                lambda m, i, o: modes.add((pl_module.phases.current, m.training))
            )

    trained = student_of(fit(module=make_module(gpt2_dir), callbacks=[Watch()]))
    assert ("update", True) in modes
    assert {mode for phase, mode in modes if phase != "update"} == {False}
    assert ("generate", False) in modes
    assert ("evaluate", False) in modes
    quiet = save_model(tmp_path / "quiet", family="gpt2", attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)
    assert differ(trained, student_of(fit(module=make_module(quiet))))


def test_learning_works(fit: Fit, model_dir: Path) -> None:
    """The divergence from a frozen teacher goes down."""

    class Losses(Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any
        ) -> None:
            self.values.append(float(outputs["loss"]))

    folder = model_dir.parent / "sharp-model"
    module = make_module(save_model(folder), skip_first_tokens=0)
    sharpen(module.model, 4.0)
    module.prepare_copies(module.model)
    losses = Losses()
    fit(
        module=module,
        data=make_data(("only",), steps=40),
        teacher=EMATeacher("frozen"),
        callbacks=[losses],
    )
    first, last = sum(losses.values[:5]) / 5, sum(losses.values[-5:]) / 5
    assert last < 0.6 * first, (first, last)


# ---------------------------------------------------------------- bad numbers


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha", -0.1),
        ("alpha", math.nan),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_k", -1),
        ("skip_first_tokens", -1),
        ("rollouts_per_prompt", 0),
        ("max_new_tokens", 0),
    ],
)
def test_a_number_out_of_range_is_named(model_dir: Path, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        make_module(model_dir, **{key: value})
