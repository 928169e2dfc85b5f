"""The vLLM engine beyond what every engine keeps to (tests/test_engines.py), over a fake package.

The last test takes the real one, where it is installed beside a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fake_vllm
import pytest
import torch
from conftest import make_model, make_module, make_qwen2, run_fit, sharpen
from decoders import greedy, lively, prompts, same
from torch import Tensor
from transformers import PreTrainedModel

from sdft.cli import main
from sdft.rollout import GenerateEngine, Sampling
from sdft.vllm_engine import VLLMEngine

REFERENCE = GenerateEngine()
PROMPTS = [[3, 9, 10, 4], [3, 12, 4]]


@pytest.fixture(autouse=True)
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    monkeypatch.setattr(fake_vllm.LLM, "made", [])


def exact(**options: Any) -> VLLMEngine:
    """In the precision of the tests' models."""
    return VLLMEngine(**{"dtype": "float64", "max_difference": 1e-3} | options)


def calls() -> list[str]:
    """What vLLM was told since the last look."""
    (llm,) = fake_vllm.LLM.made
    told, llm.calls = llm.calls, []
    return told


def move(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


# ---------------------------------------------------------------- sleep, wake, update


def test_level_2_writes_the_weights_before_every_rollout() -> None:
    engine, model = exact(sleep_level=2), lively("llama")
    engine.generate(model, PROMPTS, greedy(2), [], 0)
    assert calls() == ["write", "reset", "generate", "sleep 2"]
    engine.generate(model, PROMPTS, greedy(2), [], 0)
    woken = ["wake weights", "write", "reset", "wake kv_cache", "generate", "sleep 2"]
    assert calls() == woken


def test_level_1_writes_them_when_they_have_changed() -> None:
    engine, model = exact(sleep_level=1), lively("llama")
    engine.generate(model, PROMPTS, greedy(2), [], 0)
    assert calls() == ["write", "reset", "generate", "sleep 1"]
    engine.generate(model, PROMPTS, greedy(2), [], 0)
    assert calls() == ["wake weights", "reset", "wake kv_cache", "generate", "sleep 1"]
    move(model)
    engine.generate(model, PROMPTS, greedy(2), [], 0)
    changed = ["wake weights", "write", "reset", "wake kv_cache", "generate", "sleep 1"]
    assert calls() == changed


def test_level_0_neither_sleeps_nor_forgets_without_need() -> None:
    engine, model = exact(sleep_level=0), lively("llama")
    engine.generate(model, PROMPTS, greedy(2), [], 0)
    assert calls() == ["write", "reset", "generate"]
    engine.generate(model, PROMPTS, greedy(2), [], 0)
    assert calls() == ["generate"]
    move(model)
    engine.generate(model, PROMPTS, greedy(2), [], 0)
    assert calls() == ["write", "reset", "generate"]
    assert not fake_vllm.LLM.made[0].can_sleep


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_write_that_failed_is_done_again(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = exact(sleep_level=level), lively("llama")
    engine.generate(model, PROMPTS, greedy(4), [], 0)
    move(model)
    with monkeypatch.context() as broken:
        broken.setattr(fake_vllm.LLM, "apply_model", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            engine.generate(model, PROMPTS, greedy(4), [], 0)
    fake_vllm.LLM.made[0].asleep &= {"kv_cache"}  # the weights are awake already
    monkeypatch.setattr(fake_vllm.LLM, "wake_up", lambda self, tags: self.asleep.clear())
    found = engine.generate(model, PROMPTS, greedy(4), [], 0)
    assert same(found, REFERENCE.generate(model, PROMPTS, greedy(4), [], 0))


def fail(*args: Any) -> None:
    raise RuntimeError("no memory")


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("level", [0, 1, 2])
def test_adapters_are_sampled_from_merged(level: int) -> None:
    peft = pytest.importorskip("peft")
    engine, model = exact(sleep_level=level), sharpen(make_qwen2(), 4).double()
    base = {name: weight.clone() for name, weight in model.named_parameters()}
    plain = engine.generate(model, PROMPTS, greedy(8), [], 0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft.inject_adapter_in_model(config, model, adapter_name="default")
    model.double()
    for _ in range(2):
        adapted = engine.generate(model, PROMPTS, greedy(8), [], 0)
        assert not same(adapted, plain)
        assert same(adapted, REFERENCE.generate(model, PROMPTS, greedy(8), [], 0))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.mul_(-2)
    for name, weight in base.items():
        own = dict(model.named_parameters())
        kept = own.get(name, own.get(name.replace(".weight", ".base_layer.weight")))
        kept = own.get(name.replace(".bias", ".base_layer.bias")) if kept is None else kept
        assert kept is not None
        assert torch.equal(kept, weight)


def test_pefts_wrapper_is_looked_through() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(sharpen(make_model(), 4), config).double().eval()
    found = exact().generate(model, PROMPTS, greedy(8), [], 0)
    assert same(found, REFERENCE.generate(model, PROMPTS, greedy(8), [], 0))


# ---------------------------------------------------------------- what vLLM is started with


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_as_the_students_is(tied: bool) -> None:
    model = sharpen(make_qwen2(tie_word_embeddings=tied)).double()
    model.config.tie_word_embeddings = not tied  # what a configuration says need not be so
    found = exact().generate(model, PROMPTS, greedy(8), [], 0)
    assert fake_vllm.LLM.made[0].config.tie_word_embeddings is tied
    assert same(found, REFERENCE.generate(model, PROMPTS, greedy(8), [], 0))


def test_options_reach_vllm_and_defaults_fit_training() -> None:
    engine = VLLMEngine(gpu_memory_utilization=0.2, options={"enforce_eager": True})
    assert engine.settings["dtype"] == "bfloat16"
    engine.generate(make_model(), PROMPTS, Sampling(2), [1], 0)
    (llm,) = fake_vllm.LLM.made
    assert llm.mode == "processed_logprobs"
    assert next(llm.model.parameters()).dtype == torch.bfloat16


def test_what_starting_vllm_costs_the_process_is_given_back() -> None:
    threads, model = torch.get_num_threads(), lively("llama")
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    exact().generate(model, PROMPTS, greedy(2), [], 0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


# ---------------------------------------------------------------- what is refused


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"pip install 'sdft\[vllm\]'"):
        VLLMEngine().generate(make_model(), PROMPTS, Sampling(2), [1], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 1.2}, "gpu_memory_utilization"),
        ({"sleep_level": 3}, "sleep_level must be 0, 1 or 2"),
        ({"max_difference": 0.0}, "max_difference"),
        ({"options": {"quantization": "fp8", "model": "x"}}, "cannot set model, quantization"),
    ],
)
def test_a_setting_that_cannot_be_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLLMEngine(**options)


def test_a_temperature_that_vllm_would_raise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature of 0 or of 0\.01 and more, found 0\.001"):
        exact().generate(lively("llama"), PROMPTS, Sampling(2, temperature=0.001), [1], 0)


def test_a_context_that_cuts_completions_is_an_error() -> None:
    engine = exact(max_model_len=8)
    with pytest.raises(ValueError, match="ended row 0 after 4 of 6 tokens"):
        engine.generate(lively("llama"), PROMPTS, greedy(6), [], 0)


def test_weights_that_vllm_does_not_get_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    load = fake_vllm.ServedModel.load_weights

    def partly(self: fake_vllm.ServedModel, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return load(self, (pair for pair in weights if "norm" not in pair[0]))

    monkeypatch.setattr(fake_vllm.ServedModel, "load_weights", partly)
    with pytest.raises(ValueError, match=r"does not give: served\.model\.layers\.0\.input"):
        exact().generate(lively("llama"), PROMPTS, greedy(2), [], 0)


def test_another_model_than_the_student_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason: weights that vLLM says it took, kernels, positions."""
    load = fake_vllm.ServedModel.load_weights

    def stale(self: fake_vllm.ServedModel, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        def without(pairs: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            for name, weight in pairs:
                yield name, weight * 0.5 if "q_proj" in name else weight

        return load(self, without(weights))

    monkeypatch.setattr(fake_vllm.ServedModel, "load_weights", stale)
    engine = exact()
    engine.generate(lively("llama"), PROMPTS, greedy(2), [], 0)  # nothing to compare with
    with pytest.raises(ValueError, match="nats per token away from the student's"):
        engine.generate(lively("llama"), PROMPTS, Sampling(4), [], 0)


def test_keys_and_values_that_stay_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_vllm.LLM, "reset_prefix_cache", lambda self: False)
    with pytest.raises(RuntimeError, match="keys and values of the weights before"):
        exact().generate(lively("llama"), PROMPTS, greedy(2), [], 0)


# ---------------------------------------------------------------- draws, and a run


def test_a_rows_draws_do_not_depend_on_its_company() -> None:
    model, given = sharpen(make_model()), prompts(2, count=6)
    drawn = []
    for first in ([3, 4], [5, 6, 7], [8], [10, 11]):
        torch.manual_seed(3)
        found = exact().generate(model, [first, *given], Sampling(8), [1, 5, 7, 9, 12], 0)
        drawn.append(found.completions())
    assert len({len(completions[0]) for completions in drawn}) > 1
    assert all(completions[1:] == drawn[0][1:] for completions in drawn)


def test_autocast_and_inference_mode_stay_outside() -> None:
    engine, model = exact(), lively("llama")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = engine.generate(model, PROMPTS, greedy(8), [], 0)  # the fake would refuse them
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert same(found, REFERENCE.generate(model, PROMPTS, greedy(8), [], 0))


def test_log_probabilities_are_those_of_the_tokens_and_zero_at_padding() -> None:
    model = sharpen(make_model())
    rollout = exact().generate(model, PROMPTS * 20, Sampling(6, temperature=1.5), [1, 9], 0)
    assert rollout.logps_BT is not None
    assert (rollout.logps_BT[~rollout.mask_BT] == 0).all()
    row = int((rollout.lengths_B > 2).nonzero()[0])
    ids = rollout.completions()[row]
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*(PROMPTS * 20)[row], *ids]])).logits[0] / 1.5
    logps_T = logits_TV.log_softmax(-1)[-len(ids) - 1 : -1].gather(-1, torch.tensor(ids)[:, None])
    torch.testing.assert_close(rollout.logps_BT[row, : len(ids)], logps_T.squeeze(-1))
    assert exact().generate(model, PROMPTS, greedy(4), [1], 0).logps_BT is None


def test_a_run_trains_with_it(tmp_path: Path, model_dir: Path, no_plots: None) -> None:
    module = make_module(model_dir, engine=VLLMEngine(dtype="float32", max_difference=1e-2))
    trainer, _ = run_fit(tmp_path, model_dir, module=module)
    assert trainer.global_step == 6
    assert calls().count("write") > 6


def test_it_is_named_in_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    name = "sdft.vllm_engine.VLLMEngine"
    options = [f"--model.engine={name}", "--model.engine.options={enforce_eager: true}"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *options, "--model.engine.sleep_level=1", "--print_config"])
    output = capsys.readouterr()
    assert stop.value.code == 0, output.err
    assert f"class_path: {name}" in output.out
    assert "enforce_eager: true" in output.out


# ---------------------------------------------------------------- the real package


@pytest.mark.gpu
@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_real_vllm_samples_from_the_student(level: int) -> None:
    pytest.importorskip("vllm")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    model = sharpen(make_model(**shape, max_position_embeddings=512), 2).cuda()
    engine = VLLMEngine(
        gpu_memory_utilization=0.2,
        sleep_level=level,  # type: ignore[arg-type]
        dtype="float32",
        max_difference=0.05,
        options={"enforce_eager": True},
    )
    for _ in range(2):
        expected = REFERENCE.generate(model, PROMPTS, greedy(8), [1], 0)
        assert same(engine.generate(model, PROMPTS, greedy(8), [1], 0), expected)
        drawn = []
        for _ in range(2):
            torch.manual_seed(3)
            drawn.append(engine.generate(model, PROMPTS * 8, Sampling(8), [1], 0))
        assert same(*drawn)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3)
