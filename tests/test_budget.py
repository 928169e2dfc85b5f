"""The calculator against counted parameters and hand-made sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_gpt2, make_model, make_qwen2
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from sdft.adapters import own_parameters, twin, widen
from sdft.budget import Device, Storage, Workload, memory_lines, peak, step_time
from sdft.cli import main
from sdft.lora import LoRA
from sdft.models import ModelSource
from sdft.shapes import SHAPES, ModelShape, find_shape


def counted(config: Any) -> int:
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config).num_parameters())


QWEN = {"qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b"}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_known_shape_has_the_parameters_of_the_model_it_stands_for(name: str) -> None:
    shape = SHAPES[name]
    kind = Qwen2Config if name in QWEN else LlamaConfig
    config = kind(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
    )
    assert shape.parameters == counted(config)
    assert ModelShape.from_config(config) == shape


@pytest.mark.parametrize("make", [make_model, make_qwen2])
def test_a_configuration_gives_the_models_own_count(make: Any) -> None:
    model = make()
    shape = ModelShape.from_config(model.config)
    assert shape.parameters == model.num_parameters()
    embedding = model.get_input_embeddings().weight.numel()
    assert shape.matrix_parameters == shape.parameters - (0 if shape.tied else embedding)


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="'gpt2' lacks 'intermediate_size'"):
        ModelShape.from_config(make_gpt2().config)


def test_the_embedded_model_and_its_folder_have_one_shape(tmp_path: Any) -> None:
    make_model().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert find_shape(str(tmp_path)) == ModelShape.from_config(config)
    assert find_shape(str(tmp_path / "config.json")) == ModelShape.from_config(config)
    assert find_shape("sdft:world").parameters == 908_672


def test_the_budget_is_the_sum_of_its_formulas() -> None:
    shape = SHAPES["qwen2.5-7b"]
    work = Workload(batch=8, prompt=100, demonstration=0, completion=50)
    sizes = {
        (line.name, line.phase): line.size
        for line in memory_lines(shape, work, Storage(optimizer="adamw", teacher="float32"))
    }
    assert sizes["student", "always"] == 4 * shape.parameters
    assert sizes["optimizer (adamw)", "always"] == 8 * shape.parameters
    # 28 layers, 4 key-value heads of 128, keys and values in two bytes: 57,344 bytes a token.
    assert sizes["key-value cache", "rollout"] == 57_344 * 8 * 150


def test_the_peak_is_the_worse_of_the_two_phases() -> None:
    shape = SHAPES["qwen2.5-0.5b"]
    lines = memory_lines(shape, Workload(batch=512, completion=4096), Storage())
    phases = ("always", "rollout", "update")
    held = {phase: sum(line.size for line in lines if line.phase == phase) for phase in phases}
    assert held["rollout"] > held["update"]
    assert peak(lines) == held["always"] + held["rollout"]


def test_a_7b_full_fine_tune_with_its_teacher_fits_one_141_gb_gpu_in_the_lean_precisions() -> None:
    shape, work = SHAPES["qwen2.5-7b"], Workload()
    assert peak(memory_lines(shape, work, Storage())) > 141e9
    lean = Storage(optimizer="adamw_bf16", teacher="bfloat16")
    assert peak(memory_lines(shape, work, lean)) < 141e9


def test_sharding_divides_what_is_sharded() -> None:
    shape = SHAPES["qwen2.5-7b"]
    one, eight = (memory_lines(shape, Workload(), Storage(gpus=n)) for n in (1, 8))
    student = [next(x.size for x in lines if x.name == "student") for lines in (one, eight)]
    assert student[0] == 8 * student[1]


def test_time_grows_with_the_completion_and_an_sft_step_is_cheaper() -> None:
    shape, device = SHAPES["qwen2.5-7b"], Device()
    short, long = (
        step_time(shape, Workload(completion=length), Storage(), device) for length in (256, 1024)
    )
    assert short.generate < long.generate
    assert long.sft < long.total


def test_larger_batches_decode_at_less_cost_per_row() -> None:
    shape, device = SHAPES["qwen2.5-7b"], Device()
    small, large = (step_time(shape, Workload(batch=n), Storage(), device) for n in (32, 128))
    assert large.generate < 4 * small.generate
    assert large.total / large.sft < small.total / small.sft


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, found 0"),
        ({"demonstration": -1}, "demonstration must be 0 or more, found -1"),
    ],
)
def test_bad_values(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(**options)


def test_the_command_prints_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--model", "qwen2.5-7b"]) == 1
    assert "DOES NOT FIT 141 GB" in capsys.readouterr().out
    lean = ["--keep.optimizer", "adamw_bf16", "--keep.teacher", "bfloat16"]
    assert main(["budget", "--model", "qwen2.5-7b", *lean, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["fits"]
    assert record["parameters"] == 7_615_616_512


def test_the_command_names_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--model", "./nowhere"]) == 2
    assert "'./nowhere' does not exist" in capsys.readouterr().err


def test_adapters_are_counted_as_they_are_made() -> None:
    pytest.importorskip("peft")
    model = make_model(hidden_size=64, intermediate_size=128)
    shape = ModelShape.from_config(model.config)
    LoRA(rank=3).inject(model)
    adapters = own_parameters(model)
    assert shape.adapter_parameters(3) == sum(p.numel() for p in adapters)
    keep = Storage(lora_rank=3, base="float32")
    lines = {line.name: line.size for line in memory_lines(shape, Workload(), keep)}
    assert lines["adapters"] == sum(p.numel() * p.element_size() for p in adapters)
    teacher = twin(model)
    widen(teacher, 12)
    assert lines["teacher"] == sum(p.numel() * p.element_size() for p in own_parameters(teacher))
    assert lines["base"] == 4 * (
        sum(p.numel() for p in model.parameters()) - shape.adapter_parameters(3)
    )


def test_a_base_of_4_bits_is_counted_as_bitsandbytes_keeps_it(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    make_model(hidden_size=256, intermediate_size=512).save_pretrained(tmp_path)
    model = ModelSource(str(tmp_path)).load_model(torch.float32, quantization="nf4")
    shape = ModelShape.from_config(model.config)
    found = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        if (state := getattr(module, "quant_state", None)) is not None:
            found += state.absmax.numel() + 4 * state.state2.absmax.numel()
    keep = Storage(lora_rank=3, quantization="nf4")
    lines = {line.name: line.size for line in memory_lines(shape, Workload(), keep)}
    assert lines["base"] == pytest.approx(found, rel=0.01)


def test_under_adapters_the_weights_need_no_gradient() -> None:
    whole, adapted = (
        step_time(SHAPES["qwen2.5-7b"], Workload(), Storage(lora_rank=rank), Device())
        for rank in (0, 16)
    )
    assert (adapted.generate, adapted.score) == (whole.generate, whole.score)
    assert adapted.update == pytest.approx(0.75 * whole.update, rel=0.03)


def test_4_bits_without_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a lora_rank"):
        Storage(quantization="nf4")
    with pytest.raises(ValueError, match="lora_rank must be 0 or more"):
        Storage(lora_rank=-1)


def test_adapters_are_not_sharded() -> None:
    with pytest.raises(ValueError, match="gpus must be 1 with a lora_rank, found 8"):
        Storage(lora_rank=16, gpus=8)
