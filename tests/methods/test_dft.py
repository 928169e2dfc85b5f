"""DFT: each token's cross-entropy times its probability, and no gradient through the latter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_method, sharpen
from lightning.pytorch import Callback, Trainer

from sdft import Example
from sdft.batch import Batch
from sdft.losses import token_cross_entropy
from sdft.methods import DFTModule, SFTModule
from sdft.mixtures import GeneralPrompts, PastReplay
from sdft.scoring import completion_logits

pytestmark = pytest.mark.usefixtures("no_plots")


def token_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return DFTModule.token_loss(DFTModule.__new__(DFTModule), logits, target)


def test_the_value_is_p_times_the_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 7) * 4, torch.randint(7, (2, 3))
    p = logits.softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(token_loss(logits, target), -p * p.log())


def test_no_gradient_passes_through_the_weight() -> None:
    """By hand: ∂(p · CE)/∂logits with p constant is p · (softmax − one-hot)."""
    torch.manual_seed(0)
    logits = (torch.randn(2, 3, 7) * 4).requires_grad_()
    target = torch.randint(7, (2, 3))
    (found,) = torch.autograd.grad(token_loss(logits, target).sum(), logits)
    q = logits.detach().softmax(-1)
    p = q.gather(-1, target.unsqueeze(-1))
    expected = p * (q - torch.nn.functional.one_hot(target, 7))
    torch.testing.assert_close(found, expected)
    (through,) = torch.autograd.grad((-p * logits.log_softmax(-1)).sum(), logits)
    assert not torch.allclose(found, through), "an unweighted sum would look alike"


def test_a_hopeless_token_has_neither_loss_nor_gradient() -> None:
    logits = torch.tensor([[[200.0, -200.0]]], requires_grad=True)
    loss = token_loss(logits, torch.tensor([[1]]))
    loss.sum().backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_the_training_step_is_sfts_with_this_loss(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SFTModule, "_log_step", lambda *args: None)
    module = make_method(DFTModule, model_dir)
    sharpen(module.model)
    examples = [Example(({"role": "user", "content": "a b"},), "c", d) for d in ("c d e", "f")]
    batch = Batch(examples, [module.encoder.student_ids(example) for example in examples])
    expected = []
    for prompt, example in zip(batch.student_ids, examples, strict=True):
        answer = [*module.tokenizer.encode(example.demonstration), 1]
        logits = module.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        p = logits.softmax(-1)[range(len(answer)), answer]
        expected.append((-p * p.log()).mean())
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, torch.stack(expected).mean(), atol=1e-5, rtol=1e-4)


def test_it_makes_the_demonstrations_likelier(fit: Callable[..., Any], model_dir: Path) -> None:
    probabilities: list[float] = []

    class Watch(Callback):
        @torch.no_grad()
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int
        ) -> None:
            target = pl_module.targets(batch)
            logits = completion_logits(pl_module.model, batch.student_ids, target, pl_module.pad_id)
            nll = token_cross_entropy(logits, target.ids_BT)[target.mask_BT]
            probabilities.append(float((-nll).exp().mean()))

    module = make_method(DFTModule, model_dir)
    fit(module=module, data=make_data(("only",), steps=80), callbacks=[Watch()])
    assert probabilities[-1] > 3 * probabilities[0]


def test_it_replays_but_distils_no_general_prompts(
    fit: Callable[..., Any], model_dir: Path
) -> None:
    fit(module=make_method(DFTModule, model_dir), data=make_data(mixtures=[PastReplay()]))
    with pytest.raises(ValueError, match=r"GeneralPrompts adds 'general' rows.*method 'dft'"):
        fit(
            module=make_method(DFTModule, model_dir),
            data=make_data(mixtures=[GeneralPrompts()]),
        )
