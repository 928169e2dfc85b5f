"""Packed attention: the choice, and a model that attends so for one pass and is left as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from architectures import make_gemma2
from conftest import IDS, make_gpt2, make_model, make_qwen2, sharpen
from test_flash import KERNELS
from test_segments import make_qkv
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sdft import attention, flash
from sdft.attention import NAME, NotPackable, choose, packed, packed_attention, say_once
from sdft.packable import packed_hidden
from sdft.segments import AttentionSettings, Segments

# ---------------------------------------------------------------- the choice


@pytest.fixture
def gpu_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention as on a GPU with everything installed, computed by hand."""
    found = [flash.Kernel.of(name, function) for name, function in KERNELS.items()]
    monkeypatch.setattr(flash, "kernels", lambda: found)
    monkeypatch.setattr(flash, "takes", lambda qkv: True)


def test_scaled_dot_products_wherever_flash_attention_does_not_run() -> None:
    assert choose(make_qkv().map(lambda x: x.float()), AttentionSettings()) is None
    assert choose(make_qkv().map(lambda x: x.bfloat16()), AttentionSettings()) is None


@pytest.mark.usefixtures("gpu_like")
def test_the_first_kernel_that_can_is_chosen_in_half_precision() -> None:
    def name(dtype: torch.dtype, settings: AttentionSettings) -> str | None:
        chosen = choose(make_qkv().map(lambda x: x.to(dtype)), settings)
        return chosen and f"{chosen[0].name}, {chosen[1]}"

    assert name(torch.float32, AttentionSettings()) is None
    assert name(torch.bfloat16, AttentionSettings(window=2)) == "torch, torch.bfloat16"
    assert name(torch.float16, AttentionSettings(softcap=2)) == "flash-attn 2, torch.float16"
    assert name(torch.float16, AttentionSettings(dropout=0.5)) == "flash-attn 2, torch.float16"
    with torch.autocast("cpu", torch.bfloat16):
        assert name(torch.float32, AttentionSettings()) == "torch, torch.bfloat16"
        assert name(torch.float64, AttentionSettings()) is None


@pytest.mark.usefixtures("gpu_like")
def test_a_model_goes_through_the_chosen_kernel() -> None:
    model = make_qwen2().to(torch.bfloat16)
    ids_N, segments = sequences()
    with torch.no_grad():
        found = packed_hidden(model, ids_N, segments)
        flash.takes = lambda qkv: False  # the fixture puts it back
        expected = packed_hidden(model, ids_N, segments)
    assert 0 < (found - expected).abs().max() < 0.1, "another rounding, the same attention"


# ---------------------------------------------------------------- a model for one pass


def sequences(lengths: tuple[int, ...] = (4, 4, 6)) -> tuple[Tensor, Segments]:
    ids_N = torch.arange(sum(lengths)) * 5 % 13 + 3
    return ids_N, Segments.of(lengths)


def implementations(model: PreTrainedModel) -> list[str]:
    configs = [getattr(module, "config", None) for module in model.modules()]
    return [config._attn_implementation for config in configs if config is not None]


def test_the_models_own_attention_comes_back() -> None:
    model = make_model()
    before = implementations(model)
    assert NAME not in before
    with packed(model, Segments.of((1,))):
        assert set(implementations(model)) == {NAME}
    assert implementations(model) == before
    with pytest.raises(KeyError), packed(model, Segments.of((1,))):
        raise KeyError
    assert implementations(model) == before
    with pytest.raises(NotPackable):
        packed_hidden(model, torch.tensor([3, 4, 5]), Segments.of((1,)))
    assert implementations(model) == before


def test_parts_with_configurations_of_their_own_are_switched_and_restored() -> None:
    text = {**IDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(**vision),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    config.text_config._attn_implementation = "eager"
    before = implementations(model)
    assert len(set(before)) == 2
    with packed(model, Segments.of((1,))):
        assert set(implementations(model)) == {NAME}
    assert implementations(model) == before


def test_two_models_take_turns_and_nest() -> None:
    student, teacher = make_model(0), make_model(1)
    ids_N, segments = sequences()
    other_ids, other = sequences((3, 9))
    alone = packed_hidden(student, ids_N, segments), packed_hidden(teacher, other_ids, other)
    with packed(student, segments) as outer:
        with packed(teacher, other) as inner:
            assert set(implementations(teacher)) == {NAME}
            again = packed_hidden(teacher, other_ids, other)
        assert implementations(teacher)[0] != NAME
        mask, positions = torch.ones_like(ids_N)[None], segments.positions_N[None]
        first = student.model(ids_N[None], mask, position_ids=positions, use_cache=False)
    assert torch.equal(again, alone[1])
    assert torch.equal(first.last_hidden_state[0], alone[0])
    assert (outer.calls, inner.calls) == (2, 0)


def test_our_attention_outside_of_a_pass_is_refused() -> None:
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(AssertionError, match=r"outside of sdft\.attention\.packed"):
        packed_attention(torch.nn.Identity(), query, query, query, None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "mask of its own"),
        ({"is_causal": False}, "not causal"),
        ({"s_aux": torch.zeros(2)}, "bias or sinks"),
        ({"position_bias": torch.zeros(2)}, "bias or sinks"),
        ({"key": torch.zeros(1, 2, 5, 4)}, "something else"),
    ],
)
def test_what_packed_sequences_cannot_follow_is_refused(
    options: dict[str, Any], reason: str
) -> None:
    inputs = dict.fromkeys(("query", "key", "value"), torch.zeros(1, 2, 3, 4))
    with packed(make_model(), Segments.of((1, 2))), pytest.raises(NotPackable, match=reason):
        packed_attention(torch.nn.Identity(), **{"attention_mask": None} | inputs | options)


def test_a_layer_must_say_what_its_window_is() -> None:
    model = make_gemma2()
    layer = model.model.layers[0].self_attn
    layer.sliding_window = None
    with pytest.raises(NotPackable, match="window"):
        packed_hidden(model, *sequences())


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(caplog.handler)  # Lightning's logger may not propagate
    say_once.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
            for _ in range(2):
                packed_hidden(make_model(), *sequences())
    finally:
        logger.removeHandler(caplog.handler)
    said = {id(record): record.getMessage() for record in caplog.records}
    assert list(said.values()) == [
        "attention of packed sequences: scaled dot product per group of equal length"
    ]


# ---------------------------------------------------------------- recomputation


def parameter_gradients(model: PreTrainedModel, other: PreTrainedModel) -> list[Tensor]:
    """Of a packed pass; between it and its backward pass, others run."""
    model.zero_grad()
    loss = packed_hidden(model, *sequences()).square().mean()
    with torch.no_grad():
        packed_hidden(other, *sequences((2, 7, 9)))
        model(torch.tensor([[3, 4, 5]]))
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def transformers_checkpointing(model: PreTrainedModel, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def torch_checkpointing(model: PreTrainedModel) -> None:
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper),
        check_fn=lambda module: isinstance(module, LlamaDecoderLayer),
    )


DRY = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
CHECKPOINTING: dict[str, Callable[[PreTrainedModel], None]] = {
    "reentrant": partial(transformers_checkpointing, reentrant=True),
    "transformers": partial(transformers_checkpointing, reentrant=False),
    "torch": torch_checkpointing,
}


@pytest.fixture
def layers_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What attention each layer ran on, one entry for each time."""
    seen: list[str] = []
    original = attention.segment_attention

    def watched(*inputs: Any) -> Tensor:
        seen.append(NAME)
        return original(*inputs)

    monkeypatch.setattr(attention, "segment_attention", watched)
    return seen


@pytest.mark.parametrize("name", CHECKPOINTING)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_recomputed_layers_attend_inside_the_segments(name: str, layers_run: list[str]) -> None:
    make = [make_model] if name == "torch" else [make_model, make_qwen2, partial(make_gpt2, **DRY)]
    for family in make:
        model, other = sharpen(family()).train(), sharpen(family(1)).train()
        expected = parameter_gradients(model, other)
        CHECKPOINTING[name](model)
        before = implementations(model)
        layers_run.clear()
        found = parameter_gradients(model, other)
        assert len(layers_run) == 2 * 2 + 2, "two layers twice, and those of the other model"
        assert implementations(model) == before
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
