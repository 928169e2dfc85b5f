"""Rollouts that a check drops count in nothing, as if they had not been drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_module
from test_module import WholeLogits, batch_of
from torch import Tensor

from sdft import SDFTModule
from sdft.batch import Batch
from sdft.checks import LengthCheck, RegexCheck
from sdft.hidden_loss import HiddenLoss
from sdft.logits_loss import LogitsLoss
from sdft.rollout import Rollout
from sdft.rollout_filter import CheckFilter
from sdft.share import Share


def built(model_dir: Path, kind: type[SDFTModule] = SDFTModule, **options: Any) -> SDFTModule:
    module = make_module(model_dir, **options)
    if kind is not SDFTModule:
        module.__class__ = kind
    module.configure_model()
    assert module.teacher is not None
    with torch.no_grad():
        for parameter in module.teacher.parameters():
            parameter.mul_(1.5)
    return module


def learnt(module: SDFTModule, batch: Batch, completion: Rollout) -> tuple[float, list[Tensor]]:
    way = HiddenLoss if module.compares_hidden else LogitsLoss
    compared = way(module, batch, completion)
    compared.score()
    loss = compared.loss()
    module.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    grads = [p.grad.clone() for p in module.model.parameters() if p.grad is not None]
    return loss.item(), grads


@pytest.mark.parametrize("budget", [None, 20])
@pytest.mark.parametrize("kind", [SDFTModule, WholeLogits])
def test_the_loss_is_that_of_the_rows_that_are_kept(
    model_dir: Path, kind: type[SDFTModule], budget: int | None
) -> None:
    if budget is not None and kind is WholeLogits:
        pytest.skip("micro-batches need hidden states")
    module = built(model_dir, kind, micro_batch_tokens=budget)
    batch = batch_of(module, 5)
    torch.manual_seed(0)
    completion = module.rollout(batch)
    rows = [0, 2, 3]
    kept = batch.keeping([row in rows for row in range(5)])
    loss, grads = learnt(module, kept, completion)
    expected, expected_grads = learnt(module, batch.rows(rows), completion.rows(rows).trimmed())
    everything, _ = learnt(module, batch, completion)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert abs(everything - expected) > 1e-4
    for found, right in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [SDFTModule, WholeLogits])
def test_nothing_kept_is_no_gradient(model_dir: Path, kind: type[SDFTModule]) -> None:
    module = built(model_dir, kind)
    batch = batch_of(module, 3)
    loss, grads = learnt(module, batch.keeping([False] * 3), module.rollout(batch))
    assert loss == 0.0
    assert all(not grad.any() for grad in grads)


def test_checks_see_the_text_and_what_is_known_of_it(model_dir: Path) -> None:
    module = built(model_dir)
    batch, seen = batch_of(module, 2), []

    def check(text: str, example: Any, facts: Any) -> str | None:
        seen.append((text, example, facts))
        return None

    ids = torch.tensor([[5, 6, 1, 0], [5, 6, 7, 8]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    completion = Rollout(ids, mask, torch.tensor([False, True]))
    scorer: Any = object()
    filtering = CheckFilter([check], module.decode, {id(batch.examples[1]): scorer})
    assert filtering(batch, completion) == [True, True]
    assert [one[1] for one in seen] == batch.examples
    assert [(f.tokens, f.truncated, f.scorer) for _, _, f in seen] == [
        (2, False, None),
        (4, True, scorer),
    ]
    assert [text for text, _, _ in seen] == [module.decode([5, 6, 1]), module.decode([5, 6, 7, 8])]


def test_it_counts_rows_that_are_its_own_alone(model_dir: Path) -> None:
    module = built(model_dir)
    batch = batch_of(module, 2)
    batch.share = Share((0, 0), (True, False), ("new",) * 3)
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    completion = Rollout(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([True, True]))
    filtering = CheckFilter([LengthCheck(), RegexCheck(must_match="zz")], module.decode, {})
    assert filtering(batch, completion) == [False, False]
    assert (filtering.seen, dict(filtering.reasons)) == (1, {"truncated": 1})
    assert [one.reason for one in filtering.dropped] == ["truncated"]
    kept = batch.keeping([True, True])
    assert (kept.count, kept.real) == (1, [True, False])
    assert math.isnan(float(batch.keeping([False, True]).mean(torch.ones(2))))
