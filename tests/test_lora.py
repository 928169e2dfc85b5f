"""Students with adapters: what trains, what is shared, what runs, what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_gpt2, make_model, make_module, make_qwen2, save_model
from transformers import AutoModelForCausalLM

from sdft import lora as lora_module
from sdft.adapter_files import save_adapters
from sdft.adapters import MARK, adapters, merged, own_parameters, twin, widen, without_adapters
from sdft.callbacks import EMATeacher, ModelExport
from sdft.decode import DecodeEngine
from sdft.direct import runs_directly
from sdft.lora import LoRA
from sdft.packable import why_not_packable
from sdft.product_average import products_moved
from sdft.rollout import GenerateEngine, Sampling, evaluation_mode

peft = pytest.importorskip("peft")

IDS = torch.tensor([[9, 10, 11, 12, 9]])
MAKERS: dict[str, Callable[..., Any]] = {
    "llama": make_model,
    "qwen2": make_qwen2,
    "gpt2": make_gpt2,
}


def adapted(make: Callable[..., Any] = make_model, moved: float = 0.1, **options: Any) -> Any:
    model = make().train()
    LoRA(**{"rank": 2, "alpha": 4.0, **options}).inject(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in own_parameters(model):
        parameter.data += moved * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    with evaluation_mode(model):
        found: torch.Tensor = model(IDS).logits
    return found


def test_only_adapters_train_and_they_are_fp32_on_any_base() -> None:
    model = make_model().to(torch.bfloat16)
    LoRA(rank=2).inject(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(MARK in name and p.dtype == torch.float32 for name, p in trained.items())
    assert "lm_head" not in " ".join(trained)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_fresh_adapters_change_nothing_and_are_the_runs_own() -> None:
    first, second = adapted(moved=0), adapted(moved=0)
    assert torch.equal(logits(first), logits(make_model()))
    for one, other in zip(own_parameters(first), own_parameters(second), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", MAKERS)
def test_a_base_and_a_twin_share_weights_and_nothing_else(family: str) -> None:
    model = adapted(MAKERS[family])
    base, other = without_adapters(model), twin(model)
    assert torch.equal(logits(base), logits(MAKERS[family]()))
    assert torch.equal(logits(other), logits(model))
    owned = {p.data_ptr() for p in own_parameters(model)}
    assert not owned & {p.data_ptr() for p in other.parameters()}
    rest = {p.data_ptr() for p in model.parameters()} - owned
    assert rest == {p.data_ptr() for p in base.parameters()}
    assert rest < {p.data_ptr() for p in other.parameters()}
    before = logits(other)
    own_parameters(model)[0].data += 1.0
    assert torch.equal(logits(other), before)
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("family", MAKERS)
def test_merged_weights_give_the_adapted_models_logits(family: str, tmp_path: Path) -> None:
    model = adapted(MAKERS[family])
    merged(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    assert (logits(model) - logits(make_model())).abs().max() > 0.01


def test_peft_loads_what_was_saved_a_teachers_ranks_too(tmp_path: Path) -> None:
    model = adapted()
    teacher = twin(model)
    widen(teacher, 5)
    for parameter in own_parameters(teacher):
        parameter.data += 0.1 * torch.randn_like(parameter)
    for name, kept in (("student", model), ("teacher", teacher)):
        save_adapters(kept, LoRA(rank=2, alpha=4.0), "base", tmp_path / name)
        loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path / name).eval()
        torch.testing.assert_close(logits(loaded), logits(kept), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", MAKERS)
def test_rollouts_are_the_adapted_models_also_after_an_update(family: str) -> None:
    model = adapted(MAKERS[family]).double()
    prompts = [[9, 10, 11], [12, 9], [13, 14, 15, 16, 9]]
    seen = []
    for _ in range(2):
        drawn = [
            engine.generate(model, prompts, Sampling(12, temperature=0.0), [1], 0)
            for engine in (DecodeEngine(), DecodeEngine(direct=False), GenerateEngine())
        ]
        found, *others = [rollout.completions() for rollout in drawn]
        assert others == [found, found]
        seen.append(found)
        for parameter in own_parameters(model):
            parameter.data += 0.3 * torch.randn_like(parameter)
    assert seen[0] != seen[1]
    if family != "gpt2":
        assert runs_directly(model, prompts[0])
    assert why_not_packable(model) is None


def test_a_base_of_less_precision_keeps_its_adapters_apart_in_rollouts() -> None:
    model = adapted().to(torch.bfloat16)
    for parameter in own_parameters(model):
        parameter.data = parameter.data.float()
    drawn = DecodeEngine().generate(model, [[9, 10]], Sampling(4, temperature=0.0), [1], 0)
    assert drawn.lengths_B.item() >= 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_average_of_training_keeps_its_motion_at_the_default_rank(
    fit: Any, model_dir: Path, checkpointing: bool
) -> None:
    options = {"lora": LoRA(2, 4.0), "gradient_checkpointing": checkpointing}
    module = make_module(model_dir, **options)
    exact: dict[str, torch.Tensor] = {}
    teacher = EMATeacher(rate=0.1)
    after_step = teacher.after_step

    def follow(trainer: Any, pl_module: Any, batch: Any) -> None:
        after_step(trainer, pl_module, batch)
        for name, adapter in adapters(pl_module.model).items():
            product = adapter.product()
            exact.setdefault(name, torch.zeros_like(product)).lerp_(product, 0.1)

    teacher.after_step = follow  # type: ignore[method-assign]
    fit(module=module, teacher=teacher, data=make_data(steps=25), enable_checkpointing=True)
    found = adapters(module.teacher)  # type: ignore[arg-type]
    wanted = torch.stack([product.norm() for product in exact.values()]).norm()
    errors = [(found[name].product() - product).norm() for name, product in exact.items()]
    assert wanted > 0.01
    assert torch.stack(errors).norm() < 0.02 * wanted
    assert 0 < float(products_moved(module.teacher, module.model)) < 1.5  # type: ignore[arg-type]


def test_a_live_teacher_is_the_student(fit: Any, model_dir: Path) -> None:
    module = make_module(model_dir, lora=LoRA(2, 4.0))
    fit(module=module, teacher=EMATeacher("live"))
    torch.testing.assert_close(logits(module.teacher), logits(module.model), atol=1e-5, rtol=1e-4)
    assert not torch.equal(logits(module.model), logits(module.base))


def test_a_frozen_teacher_is_the_base(fit: Any, model_dir: Path) -> None:
    module = make_module(model_dir, lora=LoRA(2, 4.0))
    fit(module=module, teacher=EMATeacher("frozen", storage="bfloat16"))
    assert torch.equal(logits(module.teacher), logits(module.base))
    assert torch.equal(logits(module.base), logits(make_model()))


def test_checkpoints_leave_the_base_out_and_know_it(
    fit: Any, tmp_path: Path, model_dir: Path
) -> None:
    trainer, module = fit(module=make_module(model_dir, lora=LoRA(2, 4.0)))
    path = next((tmp_path / "run").rglob("last.ckpt"))
    saved = torch.load(path, weights_only=False)["state_dict"]
    assert saved
    assert all(MARK in key for key in saved)
    fresh = make_module(model_dir, lora=LoRA(2, 4.0))
    trainer.validate(fresh, datamodule=make_data(), ckpt_path=path, verbose=False)
    assert torch.equal(logits(fresh.model), logits(module.model))
    for change, message in (
        ({"lora": LoRA(3)}, "lora of rank 2, this run with lora of rank 3"),
        ({}, "lora of rank 2, this run with no adapters"),
        (
            {"lora": LoRA(2, 4.0), "model_name": str(save_model(tmp_path / "other", seed=5))},
            "belong to another base",
        ),
    ):
        other = make_module(model_dir, **change)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            trainer.validate(other, datamodule=make_data(), ckpt_path=path, verbose=False)


def test_the_export_is_merged_and_the_adapters_come_beside_it(
    fit: Any, tmp_path: Path, model_dir: Path
) -> None:
    module = make_module(model_dir, lora=LoRA(2, 4.0))
    fit(module=module, callbacks=[ModelExport(adapters=True)])
    folder = next((tmp_path / "run").rglob("model"))
    found = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(found), logits(module.model), atol=1e-5, rtol=1e-5)
    loaded = peft.PeftModel.from_pretrained(make_model(), folder.parent / "adapters").eval()
    torch.testing.assert_close(logits(loaded), logits(module.model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "lora.rank must be at least 1, found 0"),
        ({"alpha": 0.0}, "lora.alpha must be above 0"),
        ({"dropout": 1.0}, "lora.dropout must lie in"),
        ({"teacher_rank": 3}, "lora.teacher_rank must be at least the student's 16, found 3"),
    ],
)
def test_numbers_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**change)


def test_unknown_layers_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"lora\.target_modules 'nothing'"):
        LoRA(target_modules="nothing").inject(make_model())
    monkeypatch.setattr(lora_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'sdft\[lora\]'"):
        LoRA().inject(make_model())
