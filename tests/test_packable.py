"""Which models can be packed, found out without a trace, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import PACKABLE, make, make_deepseek, make_qwen3
from conftest import make_gpt2, make_model, sharpen
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdft import packable
from sdft.packable import backbone, packed_hidden, why_not_packable
from sdft.segments import Segments

NOT_PACKABLE: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "ALiBi": (lambda: make("Bloom", n_layer=2, n_head=4), "takes no positions"),
    "its own attention": (
        lambda: make("GPTNeo", attention_types=[[["global"], 2]], num_layers=2, num_heads=4),
        "does not go through transformers' interface",
    ),
    "a mask of its own": (lambda: make("Falcon", alibi=False), "trying to pack fails"),
    "recurrent": (lambda: make("Mamba"), "takes no positions"),
    "convolutions": (
        lambda: make("Lfm2", layer_types=["conv", "full_attention"]),
        "layers of the type conv",
    ),
    "hybrid": (
        lambda: make("RecurrentGemma", attention_window_size=4),
        "layers of the type",
    ),
    "sinks": (
        lambda: make("GptOss", num_local_experts=4, head_dim=8, sliding_window=4),
        "bias or sinks",
    ),
}


@pytest.mark.parametrize("name", [*PACKABLE, "deepseek"])
def test_models_that_can_be_packed(name: str) -> None:
    assert why_not_packable(sharpen({**PACKABLE, "deepseek": make_deepseek}[name]())) is None


@pytest.mark.parametrize("name", NOT_PACKABLE)
def test_models_that_cannot_say_why_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make_it, reason = NOT_PACKABLE[name]
    model = make_it()
    for _ in range(2):
        assert reason in str(why_not_packable(model))
    messages = [r.getMessage() for r in caplog.records if r.name == "sdft.packable"]
    assert len(messages) == 1
    assert messages[0].startswith(f"{type(model).__name__} is scored with padding: ")


class Blurred(nn.Module):
    """An attention layer that mixes each token with the one before it, as a convolution does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, **options: Any) -> Any:
        before = nn.functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        return self.layer(hidden_states=hidden_states + 0.1 * before, **options)


def test_the_trial_finds_what_no_configuration_says() -> None:
    model = make_model()
    model.model.layers[1].self_attn = Blurred(model.model.layers[1].self_attn)
    assert why_not_packable(model) == "its hidden states depend on what else is packed"


def test_a_model_that_ignores_positions_cannot_be_packed() -> None:
    model = sharpen(make_gpt2())
    learned = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda positions: learned(
        torch.arange(positions.shape[1])[None]
    )
    assert why_not_packable(model) == "its hidden states depend on what else is packed"


def test_a_model_without_a_backbone_of_its_own() -> None:
    model = make_model()
    assert backbone(model) is model.model
    model.base_model_prefix = "nothing"
    assert backbone(model) is None
    assert why_not_packable(model) == "it has no backbone apart from its head"


def test_the_trial_leaves_no_trace() -> None:
    model = make_gpt2().train()  # with dropout
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0)
    assert why_not_packable(model) is None
    assert torch.equal(torch.rand(3), torch.manual_seed(0) and torch.rand(3))
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_the_trial_is_made_once_per_model(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = []
    original = packable._try
    monkeypatch.setattr(packable, "_try", lambda *inputs: trials.append(1) or original(*inputs))
    first, second = make_model(), make_model()
    for model in (first, first, second):
        assert why_not_packable(model) is None
    assert len(trials) == 2


def test_no_cache_is_made() -> None:
    seen = []
    model = make_qwen3()
    model.config.use_cache = True
    model.model.register_forward_hook(
        lambda module, inputs, options, output: seen.append((options["use_cache"], output)),
        with_kwargs=True,
    )
    packed_hidden(model, torch.tensor([3, 4, 5]), Segments.of((1, 2)))
    ((use_cache, output),) = seen
    assert use_cache is False
    assert output.get("past_key_values") is None
    assert output.get("cache") is None
