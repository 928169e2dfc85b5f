"""The divergence before training is the loss that training begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import echo_examples, make_module, save_model, sharpen

from sdft.batch import pad
from sdft.encoded import Encoded, collate
from sdft.evaluation import Response
from sdft.preflight.divergence import rollout_divergence
from sdft.rollout import Rollout

ANSWERS = [(9, 10, 11, 1), (12, 9), (10, 11, 12, 13, 9, 1)]


def setting(folder: Path, **options: Any) -> tuple[Any, list[Encoded], list[Response]]:
    module = make_module(folder, **options)
    sharpen(module.model)
    module.eval()
    items = [
        Encoded(e, module.encoder.student_ids(e), module.encoder.teacher_ids(e))
        for e in echo_examples(3)
    ]
    answers = [Response("", len(ids), False, ids) for ids in ANSWERS]
    return module, items, answers


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@torch.no_grad()
def test_it_is_the_methods_own_loss(tmp_path: Path, family: str, alpha: float) -> None:
    folder = save_model(tmp_path / "model", family=family)
    module, items, answers = setting(folder, alpha=alpha, temperature=0.7)
    module.teacher = module.model.eval()
    ids_BT, mask_BT = pad([list(ids) for ids in ANSWERS], module.pad_id, "right", module.device)
    completion = Rollout(ids_BT, mask_BT, torch.zeros(3, dtype=torch.bool))
    batch = collate(items)
    loss = module.loss(
        module.student_logits(batch, completion),
        module.score(batch, completion),
        module.loss_mask(completion),
    )
    for rows in (1, 2, 3):
        found = rollout_divergence(module, items, answers, rows)
        assert found is not None
        assert found.n == 3
        assert found.mean == pytest.approx(float(loss), rel=1e-4)


def test_the_same_view_does_not_diverge(model_dir: Path) -> None:
    module, items, answers = setting(model_dir)
    same = [Encoded(item.example, item.student_ids, item.student_ids) for item in items]
    found = rollout_divergence(module, same, answers, 3)
    assert found is not None
    assert found.mean == pytest.approx(0.0, abs=1e-7)


def test_answers_without_a_token_that_counts_are_left_out(model_dir: Path) -> None:
    module, items, answers = setting(model_dir, skip_first_tokens=3)
    found = rollout_divergence(module, items, answers, 3)
    assert found is not None
    assert found.n == 2
    module, items, answers = setting(model_dir, skip_first_tokens=6)
    assert rollout_divergence(module, items, answers, 3) is None
