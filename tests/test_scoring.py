"""Padding never changes a result: logits, greedy rollouts, losses, gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, WORDS, make_model, sharpen
from torch import Tensor
from transformers import PreTrainedModel

from sdft.batch import Batch, pad
from sdft.decode import DecodeEngine
from sdft.examples import Example
from sdft.losses import sequence_mean, token_divergence
from sdft.rollout import GenerateEngine, Rollout, RolloutEngine, Sampling
from sdft.scoring import completion_logits

PAD, EOS = 0, 1
CPU = torch.device("cpu")
PROMPTS = [[3, 9, 10, 11, 4], [3, 12, 4], [3, 13, 14, 15, 16, 9, 10, 4]]
COMPLETIONS = [[9, 10, 1], [11, 12, 13, 14, 15], [9]]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return sharpen(FAMILIES[request.param]())


def rollout(completions: list[list[int]], extra: int = 0, fill: int = PAD) -> Rollout:
    """Completions on the right of which `extra` more columns of padding stand."""
    widest = max(map(len, completions)) + extra
    ids, mask = pad(completions, fill, "right", CPU)
    missing = widest - ids.shape[1]
    ids = torch.nn.functional.pad(ids, (0, missing), value=fill)
    mask = torch.nn.functional.pad(mask, (0, missing), value=False)
    return Rollout(ids, mask, torch.zeros(len(completions), dtype=torch.bool))


@torch.no_grad()
def plain(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
    """One sequence, no padding, no mask, no positions."""
    logits: Tensor = model(torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1]


@torch.no_grad()
def batched(model: PreTrainedModel, **padding: int) -> list[Tensor]:
    completion = rollout(COMPLETIONS, **padding)
    logits = completion_logits(model, PROMPTS, completion, PAD)
    assert logits.shape == (*completion.ids_BT.shape, len(WORDS))
    return [row[: len(ids)] for row, ids in zip(logits, COMPLETIONS, strict=True)]


# ---------------------------------------------------------------- logits


def test_completion_logits_are_a_plain_forward_of_each_sequence(model: PreTrainedModel) -> None:
    for row, (prompt, ids) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        expected = plain(model, prompt, ids)
        assert expected.std() > 0.3, "logits too flat to show a mistake"
        torch.testing.assert_close(batched(model)[row], expected, atol=1e-5, rtol=1e-5)


def test_right_padding_and_what_fills_it_change_nothing(model: PreTrainedModel) -> None:
    expected = batched(model)
    for found in (batched(model, extra=4), batched(model, extra=4, fill=7)):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_pad_id_of_prompts_changes_nothing(model: PreTrainedModel) -> None:
    completion = rollout(COMPLETIONS)
    found = completion_logits(model, PROMPTS, completion, 5)
    expected = completion_logits(model, PROMPTS, completion, PAD)
    real = completion.mask_BT
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_neighbours_change_nothing(model: PreTrainedModel) -> None:
    expected = batched(model)
    for chosen in ([0], [2, 0], [1, 1, 2]):
        completion = rollout([COMPLETIONS[i] for i in chosen])
        found = completion_logits(model, [PROMPTS[i] for i in chosen], completion, PAD)
        for row, i in enumerate(chosen):
            real = found[row, : len(COMPLETIONS[i])]
            torch.testing.assert_close(real, expected[i], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_model_that_takes_no_position_ids_is_scored_too() -> None:
    model = make_model()
    forward = model.forward

    def narrow(input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> object:
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    expected = completion_logits(model, [[3, 4]], rollout([[9, 10]]), PAD)
    model.forward = narrow  # type: ignore[method-assign]
    found = completion_logits(model, [[3, 4]], rollout([[9, 10]]), PAD)
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- rollouts and losses


@pytest.mark.parametrize("engine", [GenerateEngine(), DecodeEngine()])
def test_greedy_rollouts_do_not_depend_on_padding_or_neighbours(
    model: PreTrainedModel, engine: RolloutEngine
) -> None:
    greedy = Sampling(6, temperature=0.0)
    together = engine.generate(model, PROMPTS, greedy, [EOS], PAD).completions()
    alone = [engine.generate(model, [p], greedy, [EOS], PAD).completions()[0] for p in PROMPTS]
    other_pad = engine.generate(model, PROMPTS, greedy, [EOS], 5).completions()
    long = engine.generate(model, [*PROMPTS, list(range(3, 17)) * 2], greedy, [EOS], PAD)
    assert together == alone == other_pad == long.completions()[:3]
    assert len({tuple(ids) for ids in together}) > 1, "the same answer to all shows nothing"


def loss_of(model: PreTrainedModel, completion: Rollout, prompts: list[list[int]]) -> Tensor:
    longer = [[3, 16, *prompt] for prompt in prompts]
    with torch.no_grad():
        teacher = completion_logits(model, longer, completion, PAD)
    student = completion_logits(model, prompts, completion, PAD)
    return sequence_mean(token_divergence(student, teacher), completion.mask_BT)


def test_neither_the_loss_nor_its_gradient_depends_on_padding(model: PreTrainedModel) -> None:
    values, gradients = [], []
    for extra, fill in ((0, PAD), (5, PAD), (5, 8)):
        model.zero_grad()
        loss = loss_of(model, rollout(COMPLETIONS, extra, fill), PROMPTS)
        loss.backward()
        values.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    alone = [loss_of(model, rollout([c]), [p]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert values[0] > 1e-3
    assert values[1:] == pytest.approx([values[0]] * 2, abs=1e-5)
    assert torch.stack(alone).mean().item() == pytest.approx(values[0], abs=1e-5)
    for other in gradients[1:]:
        for a, b in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- pad and Batch


def test_pad_on_either_side() -> None:
    ids, mask = pad([[5, 6], [7]], 9, "left", CPU)
    assert ids.tolist() == [[5, 6], [9, 7]]
    assert mask.tolist() == [[True, True], [False, True]]
    ids, mask = pad([[5, 6], [7], []], 9, "right", CPU)
    assert ids.tolist() == [[5, 6], [7, 9], [9, 9]]
    assert mask.tolist() == [[True, True], [True, False], [False, False]]


def test_repeat_keeps_neighbours_together() -> None:
    examples = [Example(({"role": "user", "content": c},), c) for c in "ab"]
    batch = Batch(examples, [[1], [2, 3]], [[4], [5]]).repeat(2)
    assert len(batch) == 4
    assert [example.answer for example in batch.examples] == ["a", "a", "b", "b"]
    assert batch.student_ids == [[1], [1], [2, 3], [2, 3]]
    assert batch.teacher_ids == [[4], [4], [5], [5]]
