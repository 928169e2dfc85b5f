"""Weights as a checkpoint holds them, whatever the model holds them as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import PACKABLE, make
from conftest import FAMILIES, make_model, make_qwen2, sharpen
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from sdft.whole_weights import fingerprint, has_tied_head, whole_weights


def make_moe() -> PreTrainedModel:
    """Experts that transformers holds in one tensor and stores one by one."""
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return make("Qwen3Moe", **shape, decoder_sparse_step=1, mlp_only_layers=[], head_dim=8)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {**PACKABLE, "moe": make_moe}
IDS = torch.tensor([[3, 9, 10, 4, 5]])


@pytest.mark.parametrize("name", MODELS)
def test_they_are_what_is_saved(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    found = dict(whole_weights(model))
    assert found.keys() == saved.keys()
    for key, weight in saved.items():
        assert torch.equal(found[key], weight)
        assert not found[key].requires_grad
    assert has_tied_head(model) == ("lm_head.weight" not in saved)


# ---------------------------------------------------------------- adapters


def with_adapters(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """LoRA in place, its product not zero."""
    peft = pytest.importorskip("peft")
    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    torch.manual_seed(5)
    config = peft.LoraConfig(**settings | options)
    peft.inject_adapter_in_model(config, model, adapter_name="default")
    return model


def logits_of(weights: dict[str, torch.Tensor], plain: PreTrainedModel) -> torch.Tensor:
    """What a model without adapters computes with these weights."""
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}
    logits: torch.Tensor = plain(IDS).logits
    return logits


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "some layers": {"target_modules": ["q_proj", "down_proj"]},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "a module as a whole": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize(
    ("kind", "family"), [*((kind, "llama") for kind in ADAPTERS), ("lora", "qwen2")]
)
@torch.no_grad()
def test_adapters_are_merged_and_the_model_is_left_alone(kind: str, family: str) -> None:
    make_family = FAMILIES[family]
    model = with_adapters(sharpen(make_family(), 4).double(), **ADAPTERS[kind]).double()
    if kind == "a module as a whole":
        model.lm_head.modules_to_save["default"].weight.mul_(2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = dict(whole_weights(model))
    expected = model(IDS).logits
    torch.testing.assert_close(logits_of(found, make_family().double()), expected)
    base = sharpen(make_family(), 4).double()
    assert not torch.allclose(base(IDS).logits, expected)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


@torch.no_grad()
def test_a_head_of_its_own_comes_beside_a_tied_embedding() -> None:
    model = sharpen(make_qwen2(), 4).double()
    assert has_tied_head(model)
    model = with_adapters(model, target_modules=["lm_head", "q_proj"]).double()
    assert not has_tied_head(model)
    found = dict(whole_weights(model))
    plain = make_qwen2(tie_word_embeddings=False).double()
    torch.testing.assert_close(logits_of(found, plain), model(IDS).logits)


@torch.no_grad()
def test_the_adapters_that_are_active_count() -> None:
    peft = pytest.importorskip("peft")
    model = with_adapters(make_model().double()).double()
    other = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(other, model, adapter_name="other")
    model.double()
    prints = []
    for chosen in ("default", "other", ""):
        for module in model.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.enable_adapters(bool(chosen))
                module.set_adapter(chosen or "default")
        weights = dict(whole_weights(model))
        torch.testing.assert_close(logits_of(weights, make_model().double()), model(IDS).logits)
        prints.append(str(fingerprint(whole_weights(model))))
    assert len(set(prints)) == 3
    assert prints[2] == str(fingerprint(whole_weights(make_model().double())))


@torch.no_grad()
def test_quantised_weights_are_made_dense_and_take_adapters(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    sharpen(make_model(**shape), 2).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised)
    plain = logits_of(dict(whole_weights(model)), make_model(**shape))
    torch.testing.assert_close(plain, model(IDS).logits, rtol=0, atol=0.02)
    model = with_adapters(model)
    adapted = logits_of(dict(whole_weights(model)), make_model(**shape))
    torch.testing.assert_close(adapted, model(IDS).logits, rtol=0, atol=0.02)
    assert not torch.allclose(plain, adapted, atol=0.2)
    dora = with_adapters(
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised), use_dora=True
    )
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj cannot be merged"):
        dict(whole_weights(dora))


# ---------------------------------------------------------------- shards


def test_shards_are_put_together() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, plain = make_qwen2(), dict(whole_weights(make_qwen2()))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        found = dict(whole_weights(model))
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], weight) for name, weight in plain.items())
        assert all(type(weight) is torch.Tensor for weight in found.values())
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- fingerprints


def swap_rows(weight: torch.Tensor) -> None:
    weight.copy_(weight.flip(0))


def swap_columns(weight: torch.Tensor) -> None:
    weight.copy_(weight.flip(-1))


def one_bit(weight: torch.Tensor) -> None:
    weight.view(-1)[7] = torch.nextafter(weight.view(-1)[7], torch.tensor(9, dtype=weight.dtype))


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "one bit": one_bit,
    "sign": lambda weight: weight.neg_(),
    "double": lambda weight: weight.mul_(2),
    "rows": swap_rows,
    "columns": swap_columns,
    "zero": lambda weight: weight.zero_(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_a_fingerprint_tells_any_change(change: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(8, 6, dtype=dtype), "b": torch.ones(16, dtype=dtype)}
    before = fingerprint(weights.items())
    assert before == fingerprint((name, weight.clone()) for name, weight in weights.items())
    CHANGES[change](weights["a"])
    after = fingerprint(weights.items())
    assert after[0] != before[0]
    assert after[1] == before[1]
    if change in ("sign", "double", "zero"):
        CHANGES[change](weights["b"])
        assert fingerprint(weights.items())[1] != before[1]


def test_a_fingerprint_reads_scalars_and_strided_tensors() -> None:
    weight = torch.randn(4, 6)
    one = fingerprint([("scalar", torch.tensor(2.0)), ("strided", weight.T)])
    assert one == fingerprint([("scalar", torch.tensor(2.0)), ("strided", weight.T.contiguous())])
    assert fingerprint([]) == []
