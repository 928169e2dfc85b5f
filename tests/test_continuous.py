"""Continuous batching beyond what every engine keeps to (tests/test_engines.py)."""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import make_module, run_fit
from decoders import MODELS, greedy, lively, prompts, same
from transformers import GenerationMixin, MambaConfig, MambaForCausalLM

import sdft.continuous
import sdft.paging
from sdft.cli import main
from sdft.continuous import ContinuousBatchingEngine
from sdft.paging import paging
from sdft.rollout import GenerateEngine, Sampling

ENGINE = ContinuousBatchingEngine()
REFERENCE = GenerateEngine()


@pytest.mark.parametrize("most", [1, 7, 64])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_long_prompts_are_read_in_parts(name: str, most: int) -> None:
    model, given = lively(name), [*prompts(3), [2, 3, 4, 5] * 20]
    found = ContinuousBatchingEngine(max_batch_tokens=most).generate(model, given, greedy(5), [], 0)
    assert same(found, REFERENCE.generate(model, given, greedy(5), [], 0))


def test_rows_without_room_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def tight(*args: Any) -> dict[str, Any]:
        return paging(*args) | {"num_blocks": 4, "max_requests_per_batch": 3}

    monkeypatch.setattr(sdft.continuous, "paging", tight)
    model, given = lively("llama"), prompts(3, count=20)
    found = ENGINE.generate(model, given, greedy(12), [], 0)
    assert same(found, REFERENCE.generate(model, given, greedy(12), [], 0))


def test_every_row_is_there_before_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the draws would depend on how fast rows arrive."""
    waiting: list[int] = []
    start = transformers.generation.continuous_batching.ContinuousBatchingManager.start

    def noted(self: Any) -> None:
        waiting.append(self.input_queue.qsize())
        start(self)

    monkeypatch.setattr(
        transformers.generation.continuous_batching.ContinuousBatchingManager, "start", noted
    )
    ENGINE.generate(lively("llama"), prompts(1, count=9), greedy(2), [], 0)
    assert waiting == [9]


def test_a_manager_kept_on_the_model_is_left_alone() -> None:
    """It would bring keys and values from before an update."""
    model = lively("llama")
    kept = model.init_continuous_batching(transformers.GenerationConfig(eos_token_id=-1))
    kept.start = None  # not to be used
    model._cached_continuous_batching_manager = kept
    found = ENGINE.generate(model, prompts(1), greedy(6), [], 0)
    assert same(found, REFERENCE.generate(model, prompts(1), greedy(6), [], 0))
    assert model._cached_continuous_batching_manager is kept


def test_an_error_in_the_thread_arrives_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = lively("gemma2").train()  # eager, so that the manager switches it
    own, states = model.generation_config, torch.get_rng_state()

    @functools.wraps(model.forward)
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", fail)
    for precise in (True, False):
        with (
            pytest.raises(RuntimeError, match=r"continuous batching failed.*out of memory"),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=not precise),
        ):
            ENGINE.generate(model, prompts(1), greedy(3), [], 0)
        assert model.forward is fail
        assert model.training
        assert model.generation_config is own
        assert model.config._attn_implementation == "eager"
        assert torch.equal(torch.get_rng_state(), states)
    assert gc.get_freeze_count() == 0


def test_objects_that_somebody_froze_stay_frozen() -> None:
    gc.freeze()
    try:
        ENGINE.generate(lively("llama"), prompts(1), greedy(2), [], 0)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


# ---------------------------------------------------------------- other versions, other models


@dataclass
class Config:
    """What versions between the first and this one take."""

    num_blocks: int | None = None
    block_size: int = 256
    allow_block_sharing: bool = True


@pytest.mark.parametrize("config", [None, Config])
def test_settings_go_where_the_version_has_them(
    config: type | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sdft.continuous.configuration_utils, "ContinuousBatchingConfig", config, raising=True
    )
    calls: list[dict[str, Any]] = []
    model: Any = SimpleNamespace(init_continuous_batching=lambda **given: calls.append(given))
    own: Any = SimpleNamespace()
    settings = {"num_blocks": 3, "page_size": 32, "block_size": 32, "allow_block_sharing": False}
    sdft.continuous._manager(model, own, settings)
    if config is None:
        assert calls == [{"generation_config": own, "allow_block_sharing": False}]
        assert vars(own) == settings
    else:
        expected = Config(num_blocks=3, block_size=32, allow_block_sharing=False)
        assert calls == [{"generation_config": own, "continuous_batching_config": expected}]


def test_a_transformers_without_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(
        transformers.generation.continuous_batching.ContinuousMixin, "init_continuous_batching"
    )
    assert not hasattr(GenerationMixin, "init_continuous_batching")
    with pytest.raises(ValueError, match="needs a transformers with continuous batching"):
        ContinuousBatchingEngine()


@pytest.mark.parametrize("name", MODELS)
def test_windows_are_refused_where_they_are_computed_wrongly(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.14.1")
    if name in ("gemma2", "gemma3", "sliding mistral"):
        with pytest.raises(ValueError, match=r"5\.14\.1 computes attention windows wrongly"):
            ENGINE.generate(lively(name), prompts(1), greedy(2), [], 0)
    else:
        ENGINE.generate(lively(name), prompts(1), greedy(2), [], 0)


def test_a_recurrent_model_is_refused() -> None:
    shape = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 17}
    model = MambaForCausalLM(MambaConfig(**shape, pad_token_id=0, eos_token_id=1))
    with pytest.raises(ValueError, match="keys and values, found MambaForCausalLM"):
        ENGINE.generate(model, [[3, 4]], greedy(4), [1], 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("memory_share", 0.0), ("memory_share", 1.5), ("max_batch_tokens", 0)],
)
def test_a_number_out_of_range_is_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        ContinuousBatchingEngine(**{key: value})


# ---------------------------------------------------------------- sizes


def test_pages_hold_every_row_and_the_mask_stays_small() -> None:
    model = lively("llama")
    for count in (1, 16, 3000):
        given = [[3] * 40] * count
        sizes = paging(model, given, Sampling(30), 0.5, 2048)
        assert sizes["num_blocks"] * sizes["page_size"] >= 70 * count
        tokens = sizes["num_blocks"] * sizes["page_size"]
        assert sizes["max_batch_tokens"] * tokens <= 2**27
        assert 1 <= sizes["max_batch_tokens"] <= max(40 * count, 1)
        assert not sizes["allow_block_sharing"]


@pytest.mark.parametrize("free", [10**12, 10**4])
def test_a_full_accelerator_gets_as_many_pages_as_fit(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    model: Any = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16, config=lively("qwen3").config
    )
    sizes = paging(model, prompts(1), Sampling(30), 0.5, 2048)
    assert (sizes["num_blocks"] is None) == (free == 10**4)
    assert sizes["page_size"] % 256 == 0
    assert sizes["auto_switch_to_flash"]


# ---------------------------------------------------------------- in a run


def test_a_run_trains_with_it(tmp_path: Path, model_dir: Path, no_plots: None) -> None:
    module = make_module(model_dir, engine=ENGINE)
    trainer, _ = run_fit(tmp_path, model_dir, module=module, precision="bf16-mixed")
    assert trainer.global_step == 6


def test_it_is_named_in_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["fit", *arguments])
        output = capsys.readouterr()
        assert stop.value.code == 0, output.err
        return output.out

    name = "sdft.continuous.ContinuousBatchingEngine"
    chosen = printed(f"--model.engine={name}", "--model.engine.memory_share=0.4", "--print_config")
    assert f"class_path: {name}" in chosen
    assert "memory_share: 0.4" in chosen
    help_text = printed(f"--model.engine.help={name}")
    assert "Share of the free memory" in help_text
