"""SFT: plain cross-entropy of the demonstrations, on the same stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data
from lightning.pytorch import Callback, Trainer

from sdft import Example
from sdft.batch import Batch
from sdft.methods import SFTModule

pytestmark = pytest.mark.usefixtures("no_plots")


def make_sft(folder: Path, **options: Any) -> SFTModule:
    module = SFTModule(
        model_name=str(folder),
        max_new_tokens=6,
        teacher_template="{prompt} shown {demonstration} now",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        **options,
    )
    module.configure_model()
    return module


def batch_of(module: SFTModule, examples: list[Example]) -> Batch:
    return Batch(examples, [module.encoder.student_ids(example) for example in examples])


def examples_of(*demonstrations: str) -> list[Example]:
    return [Example(({"role": "user", "content": "a b"},), "wrong", d) for d in demonstrations]


def test_the_loss_is_transformers_own(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SFTModule, "_log_step", lambda *args: None)
    module = make_sft(model_dir)
    batch = batch_of(module, examples_of("c d e", "f", "g h"))
    losses = []
    for prompt, example in zip(batch.student_ids, batch.examples, strict=True):
        answer = [*module.tokenizer.encode(example.demonstration), 1]
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        losses.append(module.model(ids, labels=labels).loss)
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in module.model.parameters())


def test_targets_are_the_demonstrations_and_their_end(model_dir: Path) -> None:
    module = make_sft(model_dir)
    found = module.targets(batch_of(module, examples_of("c d e", "f")))
    assert found.completions() == [[11, 12, 13, 1], [14, 1]]
    assert found.mask_BT.tolist() == [[True] * 4, [True, True, False, False]]


def test_a_demonstration_longer_than_a_response_is_not_cut(model_dir: Path) -> None:
    module = make_sft(model_dir)
    long = " ".join(["a"] * 20)
    assert module.targets(batch_of(module, examples_of(long))).lengths_B.tolist() == [21]


def test_it_learns_the_demonstrations(fit: Callable[..., Any], model_dir: Path) -> None:
    class Losses(Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any
        ) -> None:
            self.values.append(float(outputs["loss"]))

    losses = Losses()
    trainer, module = fit(
        module=make_sft(model_dir), data=make_data(("only",), steps=40), callbacks=[losses]
    )
    assert losses.values[-1] < 0.5 * losses.values[0]
    assert {name.split(".")[0] for name in module.state_dict()} == {"student"}
    assert trainer.callback_metrics["train/kl_base_student"] > 0


def test_without_a_teacher_no_teacher_prompt_is_needed_to_evaluate(model_dir: Path) -> None:
    module = make_sft(model_dir)
    example = Example(({"role": "user", "content": "a"},), "a")
    response = module.respond([module.encoder.student_ids(example)], module.greedy)
    assert len(response) == 1
