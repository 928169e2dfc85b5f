"""Rollouts: what is drawn, where it ends, and that the model is left as it was."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import FAMILIES, WORDS, make_gpt2, make_model, sharpen
from draws import EOS, LEAKS, PAD, assert_drawn_from, leaky, next_probs
from transformers import PreTrainedModel

from sdft.decode import DecodeEngine
from sdft.rollout import GenerateEngine, Rollout, RolloutEngine, Sampling, as_rollout

PROMPTS = [[3, 9, 10, 4], [3, 12, 4], [3, 13, 14, 15, 16, 9, 4]]
ENGINE: RolloutEngine = GenerateEngine()
ENGINES: dict[str, RolloutEngine] = {
    "generate": GenerateEngine(),
    "decode": DecodeEngine(),
    "by forward": DecodeEngine(direct=False),
    "static": GenerateEngine("static"),
}


@pytest.fixture(params=ENGINES, autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file holds for every engine."""
    monkeypatch.setattr(f"{__name__}.ENGINE", ENGINES[request.param])


def generate(
    model: PreTrainedModel,
    sampling: Sampling,
    prompts: list[list[int]] = PROMPTS,
    eos: tuple[int, ...] = (EOS,),
    seed: int = 0,
) -> Rollout:
    torch.manual_seed(seed)
    return ENGINE.generate(model, prompts, sampling, eos, PAD)


def first_tokens(model: PreTrainedModel, sampling: Sampling, draws: int = 4000) -> Counter[int]:
    return Counter(generate(model, sampling, [PROMPTS[0]] * draws).ids_BT[:, 0].tolist())


# ---------------------------------------------------------------- distributions


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_tempered_distribution(temperature: float) -> None:
    model = sharpen(make_model())
    counts = first_tokens(model, Sampling(1, temperature))
    assert_drawn_from(counts, next_probs(model, PROMPTS[0], temperature))
    # The check has teeth: another temperature's distribution fails it.
    with pytest.raises(AssertionError):
        assert_drawn_from(counts, next_probs(model, PROMPTS[0], temperature * 1.5))


def test_top_k_keeps_the_likeliest_and_their_ratios() -> None:
    model = sharpen(make_model())
    probs = next_probs(model, PROMPTS[0])
    kept = torch.where(probs >= probs.topk(3).values[-1], probs, 0.0)
    counts = first_tokens(model, Sampling(1, top_k=3))
    assert len(counts) == 3
    assert_drawn_from(counts, kept / kept.sum())


def test_top_p_keeps_the_smallest_set_with_that_mass() -> None:
    model = sharpen(make_model())
    probs = next_probs(model, PROMPTS[0])
    ordered, tokens = probs.sort(descending=True)
    size = int((ordered.cumsum(-1) < 0.6).sum()) + 1
    assert 1 < size < len(WORDS)
    kept = torch.zeros_like(probs)
    kept[tokens[:size]] = ordered[:size]
    counts = first_tokens(model, Sampling(1, top_p=0.6))
    assert set(counts) == set(tokens[:size].tolist())
    assert_drawn_from(counts, kept / kept.sum())


def test_by_default_every_token_may_be_drawn() -> None:
    # transformers' own defaults keep 50 tokens at most: more than this vocabulary has.
    torch.manual_seed(0)
    model = make_model(vocab_size=200)
    counts = first_tokens(model, Sampling(1))
    assert len(counts) > 150
    assert_drawn_from(counts, next_probs(model, PROMPTS[0]))


def test_later_tokens_are_drawn_given_the_earlier_ones() -> None:
    model = sharpen(make_model())
    completions = generate(model, Sampling(2), [PROMPTS[0]] * 4000, eos=()).ids_BT
    first = Counter(completions[:, 0].tolist()).most_common(1)[0][0]
    second = Counter(completions[completions[:, 0] == first, 1].tolist())
    assert_drawn_from(second, next_probs(model, [*PROMPTS[0], first]))


# ---------------------------------------------------------------- seeds and greedy


def test_a_seed_gives_the_same_rollouts_and_another_gives_others() -> None:
    model = sharpen(make_model())
    one, same, other = (generate(model, Sampling(8), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.ids_BT, same.ids_BT)
    assert one.completions() != other.completions()


@torch.no_grad()
def greedy_by_hand(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """No cache, no batch, no padding, no `generate`."""
    found: list[int] = []
    while len(found) < tokens and EOS not in found:
        found.append(int(model(torch.tensor([prompt + found])).logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_a_plain_loop_without_cache(family: str) -> None:
    model = sharpen(FAMILIES[family](seed=3))
    found = generate(model, Sampling(8, temperature=0.0)).completions()
    assert found == [greedy_by_hand(model, prompt, 8) for prompt in PROMPTS]


def test_greedy_ignores_the_seed() -> None:
    model = sharpen(make_model())
    greedy = Sampling(8, temperature=0.0)
    assert torch.equal(
        generate(model, greedy, seed=1).ids_BT, generate(model, greedy, seed=2).ids_BT
    )


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("eos", [(), (EOS,), (EOS, 9, 12), tuple(range(8))])
def test_every_eos_id_ends_a_completion(eos: tuple[int, ...]) -> None:
    limit = 6
    rollout = generate(make_model(), Sampling(limit), PROMPTS * 40, eos)
    ends = 0
    for ids, truncated in zip(rollout.completions(), rollout.truncated_B.tolist(), strict=True):
        assert not set(ids[:-1]) & set(eos), "something follows an end"
        assert truncated == (ids[-1] not in eos)
        assert len(ids) == limit if truncated else 1 <= len(ids) <= limit
        ends += not truncated
    assert (ends > 0) == bool(eos)
    assert rollout.lengths_B.tolist() == [len(ids) for ids in rollout.completions()]
    # Masks are runs of ones from the left: completions are padded on the right.
    assert (rollout.mask_BT[:, 1:] <= rollout.mask_BT[:, :-1]).all()


def test_an_end_on_the_very_last_token_is_no_truncation() -> None:
    rollout = as_rollout(torch.tensor([[9, 9, EOS], [9, EOS, 9], [9, 9, 9]]), [EOS], 3)
    assert rollout.truncated_B.tolist() == [False, False, True]
    assert rollout.completions() == [[9, 9, EOS], [9, EOS], [9, 9, 9]]


def test_a_pad_token_that_is_the_end_token_ends_once() -> None:
    rollout = as_rollout(torch.tensor([[9, EOS, EOS], [EOS, EOS, EOS]]), [EOS], 3)
    assert rollout.completions() == [[9, EOS], [EOS]]


# ---------------------------------------------------------------- nothing leaks in or stays


@pytest.mark.parametrize("settings", LEAKS, ids=lambda settings: next(iter(settings)))
@pytest.mark.parametrize("sampling", [Sampling(8), Sampling(8, 0.0)], ids=["sampled", "greedy"])
def test_the_models_own_generation_settings_stay_out(
    settings: dict[str, Any], sampling: Sampling
) -> None:
    plain = generate(sharpen(make_model()), sampling)
    found = generate(leaky(sharpen(make_model()), **settings), sampling)
    assert found.completions() == plain.completions()


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_settings_are_restored(training: bool) -> None:
    model = make_gpt2().train(training)
    own = model.generation_config
    generate(model, Sampling(3))
    assert model.generation_config is own
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_settings_are_restored_after_an_error(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_gpt2().train(training)
    own = model.generation_config

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, Sampling(3))
    assert model.generation_config is own
    assert all(module.training == training for module in model.modules())


def test_a_submodule_in_another_mode_keeps_it() -> None:
    model = make_gpt2().train()
    model.transformer.h[0].eval()
    generate(model, Sampling(3))
    assert model.training
    assert not model.transformer.h[0].training
    assert model.transformer.h[1].training


def test_dropout_is_off_while_generating_and_on_while_training() -> None:
    model = sharpen(make_gpt2()).train()
    greedy = Sampling(8, temperature=0.0)
    assert (
        generate(model, greedy, seed=1).completions()
        == generate(model, greedy, seed=2).completions()
    )
    assert generate(model, greedy).completions() == generate(model.eval(), greedy).completions()
    model.train()
    ids = torch.tensor([PROMPTS[0]])
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_gradient_checkpointing_changes_no_rollout() -> None:
    plain, checkpointed = sharpen(make_model()), sharpen(make_model())
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model.train()
    for sampling in (Sampling(8), Sampling(8, temperature=0.0)):
        assert (
            generate(checkpointed, sampling).completions()
            == generate(plain, sampling).completions()
        )
    assert checkpointed.is_gradient_checkpointing


def test_rollouts_carry_no_gradient() -> None:
    rollout = generate(make_model().train(), Sampling(3))
    assert not rollout.ids_BT.requires_grad
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------- bad numbers


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("top_k", -1),
    ],
)
def test_a_number_out_of_range_is_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        Sampling(**{"max_new_tokens": 4, key: value})
