"""The LM head's parts give the model's own logits, or are not given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import PACKABLE, make
from conftest import make_gpt2, make_model, make_qwen2, sharpen
from transformers import PreTrainedModel

from sdft.head import Head, head

HEADS: dict[str, Callable[[], PreTrainedModel]] = {
    **PACKABLE,
    "phi": lambda: make("Phi"),
    "cohere": lambda: make("Cohere", logit_scale=0.3),
    "granite": lambda: make("Granite", logits_scaling=3.0),
    "gemma2 capped": lambda: make(
        "Gemma2", head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=0.5
    ),
}


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_the_head_gives_the_models_logits(name: str) -> None:
    model = sharpen(HEADS[name]())
    ids = torch.tensor([[3, 9, 12, 5, 4, 10, 11]])
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    found = head(model)
    assert found is not None
    expected = model(ids).logits
    assert expected.std() > 0.1, "logits too flat to show a mistake"
    torch.testing.assert_close(found.logits(hidden), expected, atol=1e-5, rtol=1e-5)


def test_the_parts() -> None:
    plain = head(make_qwen2())
    assert plain is not None
    assert (plain.bias_V, plain.scale, plain.softcap) == (None, 1.0, None)
    model = HEADS["phi"]()
    biased = head(model)
    assert biased is not None
    assert biased.bias_V is model.lm_head.bias
    expected = {"cohere": (0.3, None), "granite": (1 / 3, None), "gemma2 capped": (1.0, 0.5)}
    for name, parts in expected.items():
        found = head(HEADS[name]())
        assert found is not None
        assert (found.scale, found.softcap) == parts


def test_the_weight_is_the_models_own_and_stays_so() -> None:
    model = make_gpt2()
    first = head(model)
    assert first is not None
    assert first.weight_VD is model.transformer.wte.weight
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    second = head(model)
    assert second is not None
    assert second.weight_VD is model.lm_head.weight


def test_scale_and_bias_come_before_the_cap() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    bias = torch.randn(5)
    expected = 2.0 * torch.tanh((hidden @ weight.T + bias) * 0.7 / 2.0)
    torch.testing.assert_close(Head(weight, bias, 0.7, 2.0).logits(hidden), expected)


def change_logits(model: PreTrainedModel, change: Callable[[Any], Any]) -> PreTrainedModel:
    def changed(module: Any, inputs: Any, output: Any) -> Any:
        output.logits = change(output.logits)
        return output

    model.register_forward_hook(changed)
    return model


UNKNOWN: dict[str, Callable[[], PreTrainedModel]] = {
    "scaled in its own way": lambda: change_logits(make_model(), lambda logits: logits * 1.01),
    "fewer tokens": lambda: change_logits(make_model(), lambda logits: logits[..., :-1]),
    "no logits": lambda: change_logits(make_model(), lambda logits: None),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_head_is_not_given_and_a_warning_says_so_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = UNKNOWN[name]()
    for _ in range(2):
        assert head(model) is None
    messages = [r.getMessage() for r in caplog.records if r.name == "sdft.head"]
    assert messages == [
        "the LM head of LlamaForCausalLM is of no known form: its whole logits are computed"
    ]


def test_a_head_that_is_no_plain_matrix_is_not_given() -> None:
    model = make_model()
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Tanh())
    assert head(model) is None
    model = make_model()
    model.base_model_prefix = "nothing"
    assert head(model) is None


def test_the_check_leaves_no_trace() -> None:
    model = make_gpt2().train()  # with dropout
    torch.manual_seed(0)
    assert head(model) is not None
    assert torch.equal(torch.rand(3), torch.manual_seed(0) and torch.rand(3))
    assert all(module.training for module in model.modules())
