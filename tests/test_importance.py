"""Importance weights: the ratio of two policies, cut at the cap, and where they enter the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_method, make_model, make_module, save_model, sharpen
from test_module import WholeLogits, batch_of, build
from torch import Tensor

from sdft import SDFTModule
from sdft.batch import Batch
from sdft.decode import DecodeEngine
from sdft.head import head
from sdft.importance import Importance, has_dropout, head_log_probs, token_log_probs
from sdft.losses import sequence_weights, token_divergence
from sdft.rollout import Rollout, Sampling
from sdft.sampler import draw

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


# ---------------------------------------------------------------- weights


def test_the_ratio_is_cut_at_the_cap() -> None:
    now = torch.tensor([0.2, 0.6, 0.5, 0.1, 0.4]).log()
    drawn = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.21]).log()
    found = Importance.of(now, drawn, 2.0)
    expected = torch.tensor([0.5, 2.0, 2.0, 1.0, 0.4 / 0.21])
    torch.testing.assert_close(found.weights_N, expected)
    assert found.capped_N.tolist()[2:] == [True, False, False]
    assert Importance.of(now, drawn, 10.0).capped_N.sum() == 0
    scalars = found.scalars()
    torch.testing.assert_close(scalars["train/importance"], expected.mean())
    assert scalars["train/importance_capped"] in (0.2, 0.4)  # 0.6 / 0.3 is at the edge


def test_tokens_that_one_side_never_draws() -> None:
    drawn = torch.tensor([-1.0, -math.inf, -math.inf])
    now = torch.tensor([-math.inf, -1.0, -math.inf])
    assert Importance.of(now, drawn, 2.0).weights_N.tolist() == [0.0, 2.0, 1.0]


def test_they_carry_no_gradient() -> None:
    now = torch.tensor([-1.0], requires_grad=True)
    assert not Importance.of(now, torch.tensor([-2.0]), 2.0).weights_N.requires_grad


@pytest.mark.parametrize("cap", [0.9, math.inf, math.nan])
def test_a_cap_out_of_range_is_named(model_dir: Path, cap: float) -> None:
    with pytest.raises(ValueError, match="importance_cap"):
        make_module(model_dir, importance_cap=cap)


# ---------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1), Sampling(1, temperature=0.6), Sampling(1, top_k=3), Sampling(1, 0.8, top_p=0.7)],
)
def test_log_probabilities_are_those_that_tokens_are_drawn_by(sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(8, generator=generator)
    rows = 20_000
    ids = draw(logits.expand(rows, -1), sampling, torch.rand(rows, generator=generator))
    found = token_log_probs(logits.expand(8, -1), torch.arange(8), sampling).exp()
    torch.testing.assert_close(found.sum(), torch.tensor(1.0))
    seen = ids.bincount(minlength=8) / rows
    torch.testing.assert_close(seen, found, atol=0.015, rtol=0)
    assert (seen[found == 0] == 0).all()
    assert (found == 0).any() == (sampling.top_k > 0 or sampling.top_p < 1)


def test_those_of_hidden_states_never_have_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharpen(make_model())
    own = head(model)
    assert own is not None
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    ids, sampling = torch.arange(9), Sampling(1, 0.7, top_k=9)
    expected = token_log_probs(own.logits(hidden), ids, sampling)
    rows: list[int] = []
    monkeypatch.setattr("sdft.importance._ROWS", 4)
    monkeypatch.setattr(
        "sdft.importance.token_log_probs",
        lambda logits, *rest: rows.append(len(logits)) or token_log_probs(logits, *rest),  # type: ignore[func-returns-value]
    )
    torch.testing.assert_close(head_log_probs(hidden, own, ids, sampling), expected)
    assert rows == [4, 4, 1]


@pytest.mark.parametrize("kind", [SDFTModule, WholeLogits])
@pytest.mark.parametrize("micro_batch_tokens", [None, 15])
def test_those_of_the_student(
    tmp_path: Path, kind: type[SDFTModule], micro_batch_tokens: int | None
) -> None:
    options = {"temperature": 0.8, "micro_batch_tokens": micro_batch_tokens}
    module = build(save_model(tmp_path, family="gpt2"), kind, **options)
    sharpen(module.model)
    torch.manual_seed(0)
    batch = batch_of(module, 4)
    completion = module.rollout(batch)
    torch.manual_seed(1)
    found = module.log_probs(batch, completion)
    torch.manual_seed(2)
    assert torch.equal(module.log_probs(batch, completion), found), "dropout is off"
    assert module.model.training
    assert (found[~completion.mask_BT] == 0).all()
    module.model.eval()
    for row, ids in enumerate(completion.completions()):
        prompt = batch.student_ids[row]
        logits = module.model(torch.tensor([[*prompt, *ids]])).logits[0] / 0.8
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(
            -1, torch.tensor(ids)[:, None]
        )
        torch.testing.assert_close(found[row, : len(ids)], expected.squeeze(-1), atol=1e-5, rtol=0)


def test_dropout_is_seen(tmp_path: Path) -> None:
    assert not has_dropout(make_model())
    assert has_dropout(make_model(attention_dropout=0.1))
    module = build(save_model(tmp_path / "gpt2", family="gpt2"))
    assert has_dropout(module.model)
    quiet = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "summary_first_dropout": 0.0}
    assert not has_dropout(build(save_model(tmp_path / "quiet", family="gpt2", **quiet)).model)


# ---------------------------------------------------------------- in the loss


class Skewed(DecodeEngine):
    """An engine whose log-probabilities differ from the student's, as vLLM's do."""

    def __init__(self, module: SDFTModule, shift: float) -> None:
        super().__init__()
        self.module, self.shift = module, shift

    def generate(self, model: Any, prompts: Any, *rest: Any) -> Rollout:
        rollout = super().generate(model, prompts, *rest)
        own_BT = self.module.log_probs(Batch([None] * len(prompts), prompts), rollout)  # type: ignore[list-item]
        generator = torch.Generator().manual_seed(5)
        noise_BT = self.shift * torch.randn(own_BT.shape, generator=generator)
        return replace(rollout, logps_BT=(own_BT + noise_BT) * rollout.mask_BT)


def by_hand(module: SDFTModule, batch: Batch, completion: Rollout) -> Tensor:
    """The weighted loss in plain words, from whole logits."""
    assert module.teacher is not None
    assert completion.logps_BT is not None
    student = module.logits(module.model, batch.student_ids, completion)
    teacher = module.logits(module.teacher, batch.teacher_ids, completion).detach()
    chosen = student.detach().log_softmax(-1).gather(-1, completion.ids_BT[..., None]).squeeze(-1)
    weights = (chosen - completion.logps_BT).exp().clamp(max=module.importance_cap)
    normaliser = sequence_weights(module.loss_mask(completion))
    return (normaliser * weights * token_divergence(student, teacher)).sum()


class OwnScore(SDFTModule):
    """Whole logits, with the plain loss."""

    def score(self, batch: Batch, completion: Rollout) -> Tensor:
        return super().score(batch, completion)


@pytest.mark.parametrize(
    ("kind", "micro_batch_tokens"), [(SDFTModule, None), (SDFTModule, 15), (OwnScore, None)]
)
def test_each_tokens_divergence_is_weighted_and_the_normaliser_stays(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[SDFTModule],
    micro_batch_tokens: int | None,
) -> None:
    logged: list[tuple[Rollout, Importance]] = []
    monkeypatch.setattr(
        SDFTModule,
        "_log_step",
        lambda self, batch, drawn, loss, compared: logged.append(
            (drawn.completion, compared.importance)
        ),
    )
    found = []
    for shift in (0.0, 1.0):
        module = build(save_model(tmp_path), kind, micro_batch_tokens=micro_batch_tokens)
        sharpen(module.model, 3.0)
        module.engine = Skewed(module, shift)
        batch = batch_of(module, 5)
        torch.manual_seed(0)
        loss = module.training_step(batch, 0)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in module.model.parameters()]
        completion, importance = logged[-1]
        module.zero_grad()
        expected = by_hand(module, batch, completion)
        expected.backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        for own, parameter in zip(gradients, module.model.parameters(), strict=True):
            torch.testing.assert_close(own, parameter.grad, rtol=1e-3, atol=1e-5)
        assert len(importance.weights_N) == int(completion.mask_BT.sum())
        found.append((loss.item(), importance))
    (plain, ones), (weighted, others) = found
    torch.testing.assert_close(ones.weights_N, torch.ones_like(ones.weights_N), rtol=1e-4, atol=0)
    assert not ones.capped_N.any()
    assert others.capped_N.any()
    assert others.weights_N.max() == 2.0
    assert weighted != pytest.approx(plain, rel=0.01)


def test_with_dropout_the_policy_is_the_one_that_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the noisy one of the training pass: else weights of an unchanged student were not 1."""
    seen: list[Importance] = []
    monkeypatch.setattr(
        SDFTModule,
        "_log_step",
        lambda self, batch, drawn, loss, compared: seen.append(compared.importance),
    )
    for kind in (SDFTModule, OwnScore):
        module = build(save_model(tmp_path, family="gpt2"), kind)
        sharpen(module.model)
        module.engine = Skewed(module, 0.0)
        module.training_step(batch_of(module, 5), 0)
        assert module.model.training
        torch.testing.assert_close(
            seen[-1].weights_N, torch.ones_like(seen[-1].weights_N), rtol=1e-4, atol=0
        )


def test_a_loss_of_its_own_cannot_be_weighted(
    fit: Fit, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_method(WholeLogits, model_dir, updates_per_generation=2)
    with pytest.raises(
        ValueError, match=r"stale is 'correct'.*WholeLogits has a `loss` of its own"
    ):
        fit(module=module)
    fit(
        module=make_method(WholeLogits, model_dir, updates_per_generation=2, stale="ignore"),
        data=make_data(("only",)),
    )
    module = build(model_dir, WholeLogits)
    module.engine = Skewed(module, 1.0)
    monkeypatch.setattr(SDFTModule, "_log_step", lambda *args: None)
    with pytest.raises(
        ValueError, match=r"log-probabilities of their own.*WholeLogits has a `loss`"
    ):
        module.training_step(batch_of(module), 0)
