"""Known models run directly, altered ones through their forward pass; both as `generate`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_gpt2, make_model, make_qwen2, sharpen
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from sdft.decode import DecodeEngine
from sdft.direct import DirectForward, runs_directly
from sdft.forward import ModelForward
from sdft.fused import FusedForward
from sdft.known import is_known
from sdft.rollout import GenerateEngine, Sampling

PROMPTS = [[3, 9, 10, 4], [3, 12, 4], [3, 13, 14, 15, 16, 9, 4]]
GREEDY = Sampling(8, temperature=0.0)


def double(model: PreTrainedModel) -> PreTrainedModel:
    return sharpen(model).double()


def assert_as_generate(model: PreTrainedModel) -> None:
    expected = GenerateEngine().generate(model, PROMPTS, GREEDY, [1], 0)
    found = DecodeEngine().generate(model, PROMPTS, GREEDY, [1], 0)
    assert found.completions() == expected.completions()


# ---------------------------------------------------------------- altered models


class Louder(LlamaRMSNorm):
    """A family's class, but changed."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 3 * super().forward(hidden_states)


class Marked(nn.Parameter):
    """Stands for sharded and quantised tensors."""


def hook(module: nn.Module, *args: Any) -> Tensor:
    return 2 * args[-1]


def pre_hook(module: nn.Module, args: Any) -> tuple[Tensor]:
    return (2 * args[0],)


def own_forward(mlp: nn.Module) -> None:
    mlp.forward = lambda x: 2 * x


def change_class(module: nn.Module) -> None:
    module.__class__ = Louder


def mark(norm: nn.Module) -> None:
    norm.weight = Marked(norm.weight.detach())


ALTERED: dict[str, Callable[[Any], Any]] = {
    "hook on the perceptron": lambda m: m.model.layers[1].mlp.register_forward_hook(hook),
    "hook before a norm": lambda m: m.model.layers[0].input_layernorm.register_forward_pre_hook(
        pre_hook
    ),
    "hook on the embedding": lambda m: m.model.embed_tokens.register_forward_hook(hook),
    "forward of its own": lambda m: own_forward(m.model.layers[0].mlp),
    "another class": lambda m: change_class(m.model.layers[1].post_attention_layernorm),
    "another class at the end": lambda m: change_class(m.model.norm),
    "another kind of tensor": lambda m: mark(m.model.norm),
}


@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED)
def test_an_altered_model_runs_through_its_forward(change: Callable[[Any], Any]) -> None:
    model = double(make_model())
    assert is_known(model)
    change(model)
    assert not is_known(model)
    assert_as_generate(model)


def test_a_global_hook_is_heeded() -> None:
    model = double(make_model())
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not is_known(model)
    finally:
        handle.remove()
    assert is_known(model)


def windowed(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = make_qwen2().config.to_dict()
    return Qwen2ForCausalLM(Qwen2Config(**config | changes)).eval()


UNKNOWN: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": make_gpt2,
    "rotation that changes with the length": lambda: make_model(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "a window in one layer": lambda: windowed(
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention"],
    ),
}


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_model_runs_through_its_forward(make: Callable[[], PreTrainedModel]) -> None:
    model = double(make())
    assert not is_known(model)
    assert_as_generate(model)


def test_an_attention_that_is_not_transformers_own_is_not_replaced() -> None:
    model = make_model()
    model.config._attn_implementation = "somebody's"
    assert not is_known(model)


def test_logits_that_differ_are_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A class that something has patched looks like the family's own."""
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 1.5 * forward(self, x))
    model = double(make_model())
    assert is_known(model)
    with caplog.at_level(logging.WARNING):
        assert_as_generate(model)
        assert_as_generate(model)
    warnings = [record for record in caplog.records if record.name == "sdft.direct"]
    assert len(warnings) == 1
    assert "LlamaForCausalLM" in warnings[0].message


# ---------------------------------------------------------------- linear layers are called


class Adapter(nn.Module):
    """What LoRA puts in a linear layer's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapt(model: Any) -> None:
    for layer in model.model.layers:
        for owner, name in ((layer.self_attn, "q_proj"), (layer.self_attn, "o_proj")):
            setattr(owner, name, Adapter(getattr(owner, name)))
        layer.mlp.down_proj = Adapter(layer.mlp.down_proj)


CALLED: dict[str, Callable[[Any], Any]] = {
    "adapters": adapt,
    "hook on a projection": lambda m: m.model.layers[0].self_attn.v_proj.register_forward_hook(
        hook
    ),
    "hook on the head": lambda m: m.lm_head.register_forward_hook(lambda _, x, y: -y),
}


@pytest.mark.parametrize("change", CALLED.values(), ids=CALLED)
def test_whatever_stands_for_a_linear_layer_is_called(change: Callable[[Any], Any]) -> None:
    model = double(make_model())
    plain = DecodeEngine().generate(model, PROMPTS, GREEDY, [1], 0)
    change(model)
    assert runs_directly(model, PROMPTS[0])
    assert not DirectForward(model, 1).stateless
    assert_as_generate(model)
    changed = DecodeEngine().generate(model, PROMPTS, GREEDY, [1], 0)
    assert changed.completions() != plain.completions()


# ---------------------------------------------------------------- logits


def qwen3(**changes: Any) -> PreTrainedModel:
    config = {k: v for k, v in make_qwen2().config.to_dict().items() if k != "layer_types"}
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**config | {"head_dim": 16} | changes)).eval()


def larger() -> PreTrainedModel:
    """More tokens than a block of the head, and an activation that is called."""
    return make_model(vocab_size=300, hidden_act="gelu", num_key_value_heads=1)


@pytest.mark.parametrize("make", [make_model, make_qwen2, qwen3, larger])
@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        (DirectForward, torch.float64, 1e-12),
        (DirectForward, torch.float32, 2e-5),
        (DirectForward, torch.bfloat16, 0.05),
        (FusedForward, torch.float64, 1e-6),  # transformers rounds the norms to fp32
        (FusedForward, torch.float32, 2e-5),
    ],
)
def test_logits_are_those_of_the_forward_pass(
    kind: type[DirectForward | FusedForward],
    make: Callable[[], PreTrainedModel],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    model = sharpen(make(), 4.0).to(dtype)
    forwards = (kind(model, 80), ModelForward(model, 0))
    with torch.no_grad():
        compare(forwards, [forward.prefill(PROMPTS) for forward in forwards], tolerance)
        rows = torch.tensor([2, 0, 0, 1])
        for step in range(70):  # beyond a block of the caches
            if step == 3:
                for forward in forwards:
                    forward.select(rows)
            if step == 5:
                for forward in forwards:
                    forward.select(torch.tensor([1, 3]))
            count = 3 if step < 3 else 4 if step < 5 else 2
            ids = torch.arange(2, 2 + count) + step % 8
            for forward in forwards:
                forward.reserve()
            compare(forwards, [forward.step(ids) for forward in forwards], tolerance)


def compare(forwards: Any, logits: list[Tensor], tolerance: float) -> None:
    direct, expected = (found.flatten(1).double() for found in logits)
    direct = without_padding(direct, expected.shape[1])
    assert (direct - expected).abs().max() <= tolerance * expected.abs().max()


def without_padding(logits_RP: Tensor, tokens: int) -> Tensor:
    """The head's blocks may go on behind the vocabulary, with tokens that are never drawn."""
    assert (logits_RP[:, tokens:] == -torch.inf).all()
    return logits_RP[:, :tokens]


def test_nothing_is_copied_from_the_weights() -> None:
    model = double(make_qwen2())
    forward = DirectForward(model, 4)
    with torch.no_grad():
        before = forward.prefill(PROMPTS)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        after = forward.prefill(PROMPTS)
    assert torch.equal(after, DirectForward(model, 4).prefill(PROMPTS))
    assert not torch.equal(before, after)
