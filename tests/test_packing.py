"""Packed equals padded, in hidden states and gradients, and no sample sees another."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from architectures import PACKABLE, make, make_deepseek
from conftest import IDS, make_gpt2, make_model, sharpen
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from sdft import packing
from sdft.batch import pad
from sdft.head import head
from sdft.packing import (
    GROUP_TOKENS,
    PackedSequences,
    completion_hidden,
    completion_hidden_padded,
    micro_batches,
    packing_pays,
    unpack,
)
from sdft.rollout import Rollout
from sdft.scoring import completion_logits

CPU = torch.device("cpu")
PROMPTS = [[3, 9, 10, 11, 4], [3, 12, 4], [3, 13, 14, 15, 16, 9, 10, 4], [5], [3, 12, 4]]
COMPLETIONS = [[9, 10, 1], [11, 12, 13, 14, 15], [9], [7, 1, 8, 6, 9, 10, 11, 12], []]
FP64 = dict.fromkeys(("gemma", "gemma2", "gemma3"), 1e-6)  # their norms are fp32 throughout


def rollout(completions: Sequence[Sequence[int]]) -> Rollout:
    ids, mask = pad(completions, 0, "right", CPU)
    return Rollout(ids, mask, torch.zeros(len(completions), dtype=torch.bool))


def hidden(model: PreTrainedModel, layout: Any, completions: Any = COMPLETIONS) -> Tensor:
    return completion_hidden(model, PROMPTS, rollout(completions), layout)


def gradients(model: PreTrainedModel, hidden_ND: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 1, hidden_ND.numel(), dtype=hidden_ND.dtype)
    (hidden_ND * weights.view_as(hidden_ND)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: grad.clone() for name, grad in grads.items() if grad is not None}


def assert_same(model: PreTrainedModel, tolerance: float) -> None:
    found, expected = hidden(model, "packed"), hidden(model, "padded")
    assert len(found) == sum(map(len, COMPLETIONS))
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    ours, theirs = gradients(model, found), gradients(model, expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = max(float(theirs[name].abs().max()), 1.0)
        torch.testing.assert_close(gradient, theirs[name], atol=tolerance * scale, rtol=0)


# ---------------------------------------------------------------- packed is padded


@pytest.mark.parametrize("name", [*PACKABLE, "deepseek"])
def test_packed_is_padded_in_fp32(name: str) -> None:
    assert_same(sharpen({**PACKABLE, "deepseek": make_deepseek}[name]()), 1e-4)


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_is_padded_in_fp64(name: str) -> None:
    assert_same(sharpen(PACKABLE[name]()).double(), FP64.get(name, 1e-9))


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", PACKABLE)
@torch.no_grad()
def test_the_head_makes_of_them_the_logits_of_the_padded_reference(name: str, layout: str) -> None:
    model = sharpen(PACKABLE[name]())
    completion = rollout(COMPLETIONS)
    expected = completion_logits(model, PROMPTS, completion, 0)[completion.mask_BT]
    found = head(model)
    assert found is not None
    assert expected.std() > 0.3, "logits too flat to show a mistake"
    logits = found.logits(hidden(model, layout))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["Bloom", "Mamba"])
@torch.no_grad()
def test_models_that_cannot_be_packed_are_padded(name: str) -> None:
    model = sharpen(make(name, n_head=4, n_layer=2))
    found = hidden(model, "packed")
    alone = [
        model.base_model(torch.tensor([p + c])).last_hidden_state[0, len(p) - 1 : -1]
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
        if c
    ]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_packed_is_padded_with_recomputed_activations() -> None:
    model = sharpen(make_model()).train()
    expected = gradients(model, hidden(model, "padded"))
    model.gradient_checkpointing_enable()
    found = gradients(model, hidden(model, "packed"))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_dropout_is_at_work_while_the_model_trains(layout: Any) -> None:
    model = make_gpt2().train()
    assert not torch.equal(hidden(model, layout), hidden(model, layout))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", PACKABLE)
def test_packed_is_padded_on_a_gpu(name: str, precision: str) -> None:
    model = PACKABLE[name]().cuda()
    completion = rollout(COMPLETIONS)
    completion = Rollout(
        completion.ids_BT.cuda(), completion.mask_BT.cuda(), completion.truncated_B.cuda()
    )
    exact = completion_hidden_padded(model, PROMPTS, completion)
    if precision == "bfloat16":
        model = model.bfloat16()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
        found = completion_hidden(model, PROMPTS, completion, "packed")
    torch.testing.assert_close(found.float(), exact, atol=0.1, rtol=0.1)
    found.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ---------------------------------------------------------------- samples are alone


@pytest.mark.parametrize("name", PACKABLE)
@torch.no_grad()
def test_a_changed_sample_changes_no_other(name: str) -> None:
    model = sharpen(PACKABLE[name]())
    changed = [[8, 1, 14], *COMPLETIONS[1:]]
    before, after = hidden(model, "packed"), hidden(model, "packed", changed)
    # The first token of the first completion is predicted by its prompt, which is the same.
    assert torch.equal(before[0], after[0])
    assert not torch.isclose(before[1:3], after[1:3], atol=1e-2).all(-1).any()
    torch.testing.assert_close(before[3:], after[3:], atol=1e-6, rtol=0)


@torch.no_grad()
def test_rows_come_out_in_their_order() -> None:
    model = sharpen(make_model())
    expected = unpack(hidden(model, "packed"), rollout(COMPLETIONS).mask_BT)
    rows = [3, 0, 4, 2, 1]
    completion = rollout([COMPLETIONS[row] for row in rows])
    found = completion_hidden(model, [PROMPTS[row] for row in rows], completion, "packed")
    found = unpack(found, completion.mask_BT)
    torch.testing.assert_close(found, expected[rows], atol=1e-5, rtol=0)


def test_sequences_lie_end_to_end() -> None:
    sequences = PackedSequences.of([[3, 4, 5], [6], [7, 8]], rollout([[9, 1], [10, 11, 1], []]))
    assert sequences.segments.lengths == (2, 3, 4)
    assert sequences.ids_N.tolist() == [7, 8, 6, 10, 11, 3, 4, 5, 9]
    assert sequences.segments.positions_N.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert sequences.predicting.tolist() == [7, 8, 2, 3, 4]


@pytest.mark.parametrize("layout", ["auto", "packed", "padded"])
def test_completions_without_a_token_have_no_hidden_states(layout: Any) -> None:
    model = make_model()
    found = completion_hidden(model, [[3], [4, 5]], rollout([[], []]), layout)
    assert found.shape == (0, 32)
    found.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() == 0


# ---------------------------------------------------------------- the layout


def used(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> str:
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("packed_hidden", "completion_hidden_padded"):
            original = getattr(packing, name)
            watched = lambda *inputs, name=name, original=original: (  # noqa: E731
                seen.append(name),
                original(*inputs),
            )[1]
            patch.setattr(packing, name, watched)
        completion_hidden(model, prompts, rollout(completions))
    (name,) = seen
    return str(name)


def test_what_is_not_worth_packing_is_padded() -> None:
    model = make_model()
    assert used(model, [[3, 4]] * 4, [[5, 6, 7]] * 4) == "completion_hidden_padded"
    assert used(model, [[3, 4]] * 40, [[5, 6]] * 39 + [[7] * 20]) == "packed_hidden"


def test_packing_pays_by_the_padding_it_saves() -> None:
    assert not packing_pays([10] * 8, [10] * 8)
    assert packing_pays([10] * 8, [100] + [10] * 7)
    assert packing_pays([100] + [10] * 7, [10] * 8)
    lengths = list(range(1, 17))  # half of it is padding, and there are many lengths
    assert not packing_pays([1] * 16, lengths)
    assert packing_pays([1] * 16, lengths, group_tokens=0)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=30),
    st.integers(0, 2 * GROUP_TOKENS),
)
def test_packing_pays_only_where_it_computes_less(
    rows: list[tuple[int, int]], group_tokens: int
) -> None:
    prompts, completions = zip(*rows, strict=True)
    lengths = [p + max(c - 1, 0) for p, c in rows]
    if packing_pays(prompts, completions, group_tokens):
        assert sum(lengths) < len(lengths) * max(lengths)


# ---------------------------------------------------------------- unpack


def test_unpack_undoes_the_mask() -> None:
    mask_BT = rollout(COMPLETIONS).mask_BT
    values = torch.randn(int(mask_BT.sum()), 3, requires_grad=True)
    rows = unpack(values, mask_BT, fill=7.0)
    assert rows.shape == (*mask_BT.shape, 3)
    assert torch.equal(rows[mask_BT], values)
    assert (rows[~mask_BT] == 7.0).all()
    assert unpack(values[:, 0], mask_BT).shape == mask_BT.shape
    (rows * 2).sum().backward()
    assert (values.grad == 2).all()


# ---------------------------------------------------------------- micro-batches

lengths_and_budget = (st.lists(st.integers(0, 40), max_size=40), st.integers(1, 60))


@given(*lengths_and_budget, st.booleans())
def test_micro_batches_hold_each_row_once_within_the_budget(
    lengths: list[int], budget: int, padded: bool
) -> None:
    batches = micro_batches(lengths, budget, padded)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch == sorted(batch)
        chosen = [lengths[row] for row in batch]
        cost = len(batch) * max(chosen) if padded else sum(chosen)
        assert cost <= budget or len(batch) == 1


@given(*lengths_and_budget)
def test_packed_micro_batches_are_few(lengths: list[int], budget: int) -> None:
    """No two of them would fit into one."""
    loads = [sum(lengths[row] for row in batch) for batch in micro_batches(lengths, budget)]
    assert all(a + b > budget for i, a in enumerate(loads) for b in loads[:i])


def test_padded_micro_batches_hold_rows_of_like_length() -> None:
    lengths = [1, 9, 2, 8, 1, 9]
    assert micro_batches(lengths, 18, padded=True) == [[1, 5], [2, 3], [0, 4]]
    assert micro_batches(lengths, 10) == [[0, 1], [4, 5], [2, 3]]
    assert micro_batches([50, 1], 10) == [[0], [1]]


def test_a_budget_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="token_budget must be at least 1, found 0"):
        micro_batches([1], 0)


def test_gradients_of_micro_batches_add_up() -> None:
    """Rows scored in parts give the same sum of gradients as all at once."""
    model = sharpen(make_model())
    rng = random.Random(0)
    prompts = [[rng.randrange(3, IDS["vocab_size"]) for _ in range(rng.randrange(1, 9))] * 2] * 6
    completions = [[rng.randrange(3, 9) for _ in range(rng.randrange(1, 12))] for _ in range(6)]
    whole = completion_hidden(model, prompts, rollout(completions), "packed")
    model.zero_grad()
    whole.square().sum().backward()
    expected = [p.grad.clone() for p in model.model.parameters()]
    model.zero_grad()
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    batches = micro_batches(lengths, 40)
    assert 1 < len(batches) < 6
    for rows in batches:
        part = rollout([completions[row] for row in rows])
        chosen = completion_hidden(model, [prompts[row] for row in rows], part, "packed")
        chosen.square().sum().backward()
    for parameter, gradient in zip(model.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-3, rtol=1e-3)
