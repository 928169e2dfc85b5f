"""What every method shares: responses, optimizer, entry points, checkpoints' identity."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    echo_examples,
    make_data,
    make_gpt2,
    make_model,
    make_module,
    make_tokenizer,
)
from lightning.pytorch import Trainer

from sdft import PythonTask
from sdft.data import ContinualDataModule
from sdft.lora import LoRA
from sdft.rollout import GenerateEngine, Rollout, Sampling
from sdft.weights import frozen_copy, identity, squared_distance

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


def prompts_of(module: Any, count: int = 5) -> list[list[int]]:
    return [module.encoder.student_ids(example) for example in echo_examples(count)]


# ---------------------------------------------------------------- responses


class Fixed:
    """Answers with given tokens."""

    def generate(self, model: Any, prompts: Any, sampling: Sampling, eos: Any, pad: int) -> Rollout:
        ids = torch.tensor([[9, 10, 1], [11, 12, 13]])
        mask = torch.tensor([[True, True, True], [True, True, True]])
        return Rollout(ids, mask, torch.tensor([False, True]))


def test_a_response_is_text_without_special_tokens_its_length_and_its_end(model_dir: Path) -> None:
    module = make_module(model_dir, engine=Fixed())
    first, second = module.respond([[3], [3]], module.greedy)
    assert (first.text, first.tokens, first.truncated) == ("a b", 3, False)
    assert (second.text, second.tokens, second.truncated) == ("c d e", 3, True)


def test_engines_answer_alike(model_dir: Path) -> None:
    default = make_module(model_dir)
    reference = make_module(model_dir, engine=GenerateEngine())
    prompts = prompts_of(default)
    assert default.respond(prompts, default.greedy) == reference.respond(prompts, default.greedy)


def test_responding_leaves_no_trace(model_dir: Path) -> None:
    module = make_module(model_dir)
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.respond(prompts_of(module), module.greedy)
    assert module.model.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_max_new_tokens_limits_training_and_evaluation(model_dir: Path) -> None:
    module = make_module(model_dir, max_new_tokens=2)
    assert max(r.tokens for r in module.respond(prompts_of(module), module.greedy)) <= 2
    assert module.sampling.max_new_tokens == 2
    assert module.prompt_room == 126


# ---------------------------------------------------------------- entry points


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_evaluation_alone_holds_one_model(model_dir: Path, tmp_path: Path, entry: str) -> None:
    module = make_module(model_dir)
    trainer = Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
    getattr(trainer, entry)(module, datamodule=make_data())
    assert module.teacher is None
    assert module.base is None
    assert {name.split(".")[0] for name in module.state_dict()} == {"student"}


def test_predictions_say_what_was_asked_and_answered(model_dir: Path, tmp_path: Path) -> None:
    examples = echo_examples(3)
    task = PythonTask("only", train=examples, test=examples)
    module = make_module(model_dir)
    trainer = Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
    data = ContinualDataModule([task], eval_batch_size=2)
    records = [r for batch in trainer.predict(module, datamodule=data) for r in batch]
    responses = module.respond([module.encoder.student_ids(e) for e in examples], module.greedy)
    assert records == [
        {
            "task": "only",
            "prompt": [dict(message) for message in example.messages],
            "response": response.text,
            "answer": example.answer,
            "truncated": response.truncated,
        }
        for example, response in zip(examples, responses, strict=True)
    ]


def test_fit_then_test_in_one_process(fit: Fit) -> None:
    trainer, module = fit()
    before = trainer.callback_metrics.copy()
    metrics = trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    assert any("test/prior/accuracy" in values for values in metrics), before
    checkpoint = Path(trainer.log_dir) / "checkpoints" / "last.ckpt"
    again = trainer.test(
        module,
        datamodule=trainer.datamodule,
        ckpt_path=checkpoint,
        weights_only=True,
        verbose=False,
    )
    assert again == metrics


def test_a_checkpoint_evaluates_as_the_run_did(fit: Fit, model_dir: Path, tmp_path: Path) -> None:
    trainer, trained = fit()
    checkpoint = Path(trainer.log_dir) / "checkpoints" / "last.ckpt"
    module = make_module(model_dir)
    fresh = Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
    fresh.test(module, datamodule=make_data(), ckpt_path=checkpoint, weights_only=True)
    expected = trained.student.state_dict()
    found = module.student.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


# ---------------------------------------------------------------- optimizer


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf])
def test_a_bad_learning_rate_is_named(fit: Fit, model_dir: Path, rate: float) -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made = torch.optim.SGD(parameters, lr=0.1)
        made.param_groups[0]["lr"] = rate  # past torch's own check
        return made

    with pytest.raises(ValueError, match=f"lr must be a finite number, 0 or more, found {rate}"):
        fit(module=make_module(model_dir, optimizer=optimizer))


@pytest.mark.parametrize("clip", [-1.0, math.nan])
def test_a_bad_clipping_value_is_named(fit: Fit, clip: float) -> None:
    with pytest.raises(ValueError, match=f"gradient_clip_val must be 0 or more, found {clip}"):
        fit(gradient_clip_val=clip)


def test_a_schedule_of_lightnings_kind_works(fit: Fit, model_dir: Path) -> None:
    def scheduler(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    trainer, _ = fit(module=make_module(model_dir, scheduler=scheduler))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**6)


def test_a_frozen_part_of_the_student_stays(fit: Fit, model_dir: Path) -> None:
    module = make_module(model_dir)
    module.model.get_input_embeddings().requires_grad_(False)
    before = module.model.get_input_embeddings().weight.clone()
    trainer, _ = fit(module=module)
    assert torch.equal(module.model.get_input_embeddings().weight, before)
    assert trainer.global_step == 6


# ---------------------------------------------------------------- identity and copies


def test_identity_tells_models_apart_and_not_their_weights() -> None:
    same = identity(make_model(seed=5))
    assert identity(make_model(seed=6)) == same
    others = [make_model(hidden_size=16), make_model(num_hidden_layers=1), make_gpt2()]
    assert all(identity(other) != same for other in others)


def test_squared_distance() -> None:
    one, other = make_model(), make_model()
    assert squared_distance(one, other).item() == 0.0
    with torch.no_grad():
        next(other.parameters()).view(-1)[:2].add_(torch.tensor([3.0, 4.0]))
    assert squared_distance(one, other).item() == pytest.approx(25.0, rel=1e-5)
    assert squared_distance(frozen_copy(one).bfloat16(), one).item() > 0


def test_no_data_module_is_an_error(model_dir: Path, tmp_path: Path) -> None:
    trainer = Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match="pass a ContinualDataModule"):
        trainer.fit(make_module(model_dir), train_dataloaders=[1])


# ---------------------------------------------------------------- the base in bfloat16


def test_a_base_in_bfloat16_is_the_published_one(fit: Fit, tmp_path: Path) -> None:
    published = tmp_path / "published"
    make_model().bfloat16().save_pretrained(published)
    make_tokenizer().save_pretrained(published)
    bases = {}
    for storage in ("float32", "bfloat16"):
        module = make_module(published, base_storage=storage)
        fit(module=module, root=storage)
        assert module.base is not None
        assert str(module.base.dtype) == f"torch.{storage}"
        bases[storage] = module.base
    pairs = zip(*(base.parameters() for base in bases.values()), strict=True)
    assert all(torch.equal(whole, half.float()) for whole, half in pairs)


def test_a_base_that_bfloat16_would_round_is_refused(fit: Fit, model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"base_storage is bfloat16, which would round .*weight"):
        fit(module=make_module(model_dir, base_storage="bfloat16"))
    with pytest.raises(ValueError, match=r"base_storage must be float32 with model.lora"):
        make_module(model_dir, base_storage="bfloat16", lora=LoRA(rank=2))
