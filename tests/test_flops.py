"""Estimated FLOPs against torch's own count of what is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from sdft.decode import DecodeEngine
from sdft.flops import ModelFlops
from sdft.rollout import Rollout, Sampling
from sdft.scoring import completion_logits

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {"vocab_size": 256}),
    "tied": ("llama", {"vocab_size": 256, "tie_word_embeddings": True}),
    "attention wider than the model": ("llama", {"head_dim": 32}),
    "learned positions": ("gpt2", {}),
    "few key-value heads": ("qwen2", {}),
}
PROMPT, COMPLETION, ROWS = 12, 40, 3


def build(name: str) -> PreTrainedModel:
    """With attention as plain products: torch does not count the fused kernel on a CPU."""
    family, changes = MODELS[name]
    model = FAMILIES[family](**changes)
    model.set_attn_implementation("eager")
    return model


def prompts() -> list[list[int]]:
    return [[8 + (row + i) % 9 for i in range(PROMPT)] for row in range(ROWS)]


def completion() -> Rollout:
    ids = torch.arange(ROWS * COMPLETION).reshape(ROWS, COMPLETION) % 9 + 8
    return Rollout(ids, torch.ones_like(ids).bool(), torch.zeros(ROWS).bool())


def scoring(model: PreTrainedModel, learns: bool) -> int:
    return ModelFlops.of(model).scoring([PROMPT] * ROWS, [COMPLETION] * ROWS, learns)


def backward(model: PreTrainedModel) -> int:
    with FlopCounterMode(display=False) as counter:
        completion_logits(model, prompts(), completion(), 0).sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass(name: str) -> None:
    model = build(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        completion_logits(model, prompts(), completion(), 0)
    assert scoring(model, learns=False) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_and_backward_pass(name: str) -> None:
    model = build(name)
    assert scoring(model, learns=True) == pytest.approx(backward(model), rel=0.01)
    assert scoring(model, learns=True) == 3 * scoring(model, learns=False)


@pytest.mark.parametrize("name", MODELS)
def test_sampling_with_a_cache(name: str) -> None:
    model = build(name)
    with FlopCounterMode(display=False) as counter:
        rollout = DecodeEngine().generate(model, prompts(), Sampling(COMPLETION), [], 0)
    assert rollout.lengths_B.tolist() == [COMPLETION] * ROWS
    found = ModelFlops.of(model).sampling([PROMPT] * ROWS, [COMPLETION] * ROWS)
    # The prompts' pass takes the logits of the last column alone, so this one is exact.
    assert found == counter.get_total_flops()


def test_what_is_frozen_gets_no_gradient() -> None:
    model = build("untied")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("down_proj" in name)
    forward, whole = scoring(model, learns=False), scoring(model, learns=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    attention = 8 * 2 * 32 * ROWS * (PROMPT + COMPLETION) ** 2
    head = model.get_output_embeddings().weight.numel()
    body = ModelFlops.of(model).body.all
    tokens, wanted = ROWS * (PROMPT + COMPLETION), ROWS * COMPLETION
    assert whole - forward == attention + 2 * (body + trained) * tokens + 2 * head * wanted
    model.requires_grad_(False)
    assert scoring(model, learns=True) == forward


def test_activations_computed_anew_are_computed_twice() -> None:
    model = build("untied")
    plain = scoring(model, learns=True)
    model.gradient_checkpointing_enable()
    assert scoring(model, learns=True) == plain, "in evaluation mode nothing is computed anew"
    model.train()
    # torch leaves out what a layer computes after the last value that is needed.
    assert scoring(model, learns=True) == pytest.approx(backward(model), rel=0.05)
    body = 2 * ModelFlops.of(model).body.all * ROWS * (PROMPT + COMPLETION)
    attention = 4 * 2 * 32 * ROWS * (PROMPT + COMPLETION) ** 2
    assert scoring(model, learns=True) - plain == body + attention


def test_the_input_embedding_counts_only_where_it_is_the_head() -> None:
    untied, tied = (ModelFlops.of(build(name)) for name in ("untied", "tied"))
    assert untied == tied
    assert untied.head.all == 256 * 32
    per_layer = 4 * 32 * 32 + 3 * 32 * 64
    assert untied.body.all == untied.body.trained == 2 * per_layer


def test_rows_add_up() -> None:
    """What a row costs does not depend on its neighbours: padding is free."""
    flops = ModelFlops.of(make_model())
    rows = [(3, 5), (11, 1), (2, 30)]
    for count in (flops.sampling, lambda p, c: flops.scoring(p, c, True)):
        together = count([p for p, _ in rows], [c for _, c in rows])
        assert together == sum(count([p], [c]) for p, c in rows)
