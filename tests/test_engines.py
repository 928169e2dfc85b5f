"""What every rollout engine keeps to, so that one may take another's place."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import fake_vllm
import numpy as np
import pytest
import torch
from conftest import make_gpt2, make_model, sharpen
from decoders import MANY, MODELS, NONE, SOME, greedy, lively, prompts, same
from draws import EOS, LEAKS, PAD, assert_drawn_from, leaky, next_probs
from transformers import PreTrainedModel

from sdft.continuous import ContinuousBatchingEngine
from sdft.decode import DecodeEngine
from sdft.rollout import GenerateEngine, Rollout, RolloutEngine, Sampling
from sdft.vllm_engine import VLLMEngine


def vllm(sleep_level: int) -> VLLMEngine:
    """The engine over the fake package, in the precision of the tests' models."""
    return VLLMEngine(sleep_level=sleep_level, dtype="float64", max_difference=1e-3)  # type: ignore[arg-type]


ENGINES: dict[str, Callable[[], RolloutEngine]] = {
    "generate": GenerateEngine,
    "decode": DecodeEngine,
    "continuous": ContinuousBatchingEngine,
    "vllm": lambda: vllm(2),
}
HOLDING: dict[str, Callable[[], RolloutEngine]] = {
    **ENGINES,
    "vllm, weights kept": lambda: vllm(1),
    "vllm, awake": lambda: vllm(0),
}
OWN_WEIGHTS = ["generate", "decode", "continuous"]  # the student's, and its precision
REFERENCE = GenerateEngine()
PROMPT = [3, 9, 10, 4]


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    monkeypatch.setattr(fake_vllm.LLM, "made", [])
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> RolloutEngine:
    return ENGINES[request.param]()


# ---------------------------------------------------------------- greedy parity, in fp64


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_what_generate_gives(name: str, engine: RolloutEngine) -> None:
    """Ragged prompts, one of them of more than 256 tokens, some of which end."""
    model = lively(name)
    given = [*prompts(3, count=3), [2, 3, 4, 5] * 75, *prompts(4, count=2, longest=120)]
    expected = REFERENCE.generate(model, given, greedy(10), SOME, 0)
    assert same(tidy(engine.generate(model, given, greedy(10), SOME, 0)), tidy(expected))


def tidy(rollout: Rollout) -> Rollout:
    """What follows an end is arbitrary."""
    return Rollout(
        rollout.ids_BT * rollout.mask_BT, rollout.mask_BT, rollout.truncated_B, rollout.logps_BT
    )


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("eos_ids", [NONE, MANY, list(range(17))], ids=["none", "many", "at once"])
def test_greedy_ends_where_generate_ends(
    engine: RolloutEngine, eos_ids: list[int], count: int
) -> None:
    model, given = lively("qwen2"), prompts(7, count=count)
    found = tidy(engine.generate(model, given, greedy(6), eos_ids, 0))
    assert same(found, tidy(REFERENCE.generate(model, given, greedy(6), eos_ids, 0)))
    if eos_ids is not MANY:
        assert found.ids_BT.shape[1] == (6 if eos_ids is NONE else 1)


def optimizer_step(model: PreTrainedModel, **options: bool) -> None:
    ids = torch.tensor([[2, 3, 4, 5, 6, 7]])
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.3, **options).step()


def write_behind_the_counters(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(-1)


CHANGES: dict[str, Callable[[PreTrainedModel], None]] = {
    "step": optimizer_step,
    "fused step": lambda model: optimizer_step(model, fused=True),
    "data": write_behind_the_counters,
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", "step"),
        ("llama", "fused step"),
        ("llama", "data"),
        ("qwen2", "step"),
        ("gpt2", "step"),
        ("gemma3", "step"),
    ],
)
@pytest.mark.parametrize("holding", HOLDING)
def test_greedy_follows_an_update(name: str, holding: str, change: str) -> None:
    # The long prompt fills a whole page, whose keys and values might be kept.
    engine = HOLDING[holding]()
    model, given = lively(name).train(), [*prompts(5), [2, 3, 4, 5] * 75]
    model.requires_grad_(True)
    before = engine.generate(model, given, greedy(8), [1], 0)
    assert same(tidy(before), tidy(engine.generate(model, given, greedy(8), [1], 0)))
    CHANGES[change](model)
    after = engine.generate(model, given, greedy(8), [1], 0)
    assert before.completions() != after.completions()
    assert same(tidy(after), tidy(REFERENCE.generate(model, given, greedy(8), [1], 0)))


@pytest.mark.parametrize("holding", HOLDING)
def test_another_model_is_another_model(holding: str) -> None:
    """Student, teacher and base may take turns."""
    engine = HOLDING[holding]()
    first, second = sharpen(make_model(seed=0)).double(), sharpen(make_model(seed=1)).double()
    for model in (first, second, first):
        expected = REFERENCE.generate(model, [PROMPT], greedy(8), [], PAD)
        assert same(engine.generate(model, [PROMPT], greedy(8), [], PAD), expected)


# ---------------------------------------------------------------- draws


def test_tokens_are_drawn_from_the_tempered_distribution(engine: RolloutEngine) -> None:
    model = sharpen(make_model())
    counts = first_tokens(engine, model, Sampling(1, temperature=0.7))
    assert_drawn_from(counts, next_probs(model, PROMPT, 0.7))
    with pytest.raises(AssertionError):  # the check has teeth
        assert_drawn_from(counts, next_probs(model, PROMPT))


def first_tokens(engine: RolloutEngine, model: PreTrainedModel, sampling: Sampling) -> Counter[int]:
    torch.manual_seed(0)
    drawn = engine.generate(model, [PROMPT] * 3000, sampling, [EOS], PAD)
    return Counter(drawn.ids_BT[:, 0].tolist())


@pytest.mark.parametrize(
    "sampling", [Sampling(1, top_k=3), Sampling(1, top_p=0.6)], ids=["top-k", "top-p"]
)
def test_only_the_likeliest_are_drawn(engine: RolloutEngine, sampling: Sampling) -> None:
    model = sharpen(make_model())
    ordered, tokens = next_probs(model, PROMPT).sort(descending=True)
    size = sampling.top_k or int((ordered.cumsum(-1) < sampling.top_p).sum()) + 1
    kept = torch.zeros_like(ordered)
    kept[tokens[:size]] = ordered[:size]
    assert_drawn_from(first_tokens(engine, model, sampling), kept / kept.sum())


def test_later_tokens_are_drawn_given_the_earlier_ones(engine: RolloutEngine) -> None:
    model = sharpen(make_model())
    torch.manual_seed(0)
    ids_BT = engine.generate(model, [PROMPT] * 3000, Sampling(2), [], PAD).ids_BT
    first = Counter(ids_BT[:, 0].tolist()).most_common(1)[0][0]
    second = Counter(ids_BT[ids_BT[:, 0] == first, 1].tolist())
    assert_drawn_from(second, next_probs(model, [*PROMPT, first]))


def test_a_seed_gives_the_same_rollouts_and_another_gives_others(engine: RolloutEngine) -> None:
    model, given = sharpen(make_model()), prompts(2, count=8)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(engine.generate(model, given, Sampling(8), [EOS], PAD))
        drawn.append(engine.generate(model, given, Sampling(8), [EOS], PAD))
    assert same(drawn[0], drawn[2])
    assert same(drawn[1], drawn[3])
    assert len({str(rollout.completions()) for rollout in drawn}) == 4


def test_greedy_leaves_every_generator_as_it_was(engine: RolloutEngine) -> None:
    model = make_model()
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    engine.generate(model, [PROMPT], greedy(3), [EOS], PAD)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert after == states


@pytest.mark.parametrize("settings", LEAKS[:1] + LEAKS[4:5] + LEAKS[6:7] + LEAKS[10:12])
def test_the_models_own_generation_settings_stay_out(
    engine: RolloutEngine, settings: dict[str, object]
) -> None:
    plain, full = sharpen(make_model()).double(), leaky(sharpen(make_model()).double(), **settings)
    found = engine.generate(full, [PROMPT], greedy(8), [EOS], PAD)
    assert (
        found.completions() == engine.generate(plain, [PROMPT], greedy(8), [EOS], PAD).completions()
    )


# ---------------------------------------------------------------- what is left behind


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_trains_on_as_if_nothing_had_been_generated(
    name: str, engine: RolloutEngine, attention: str
) -> None:
    gradients = []
    for rollouts in (0, 1, 2):  # the second leaves other modes behind than the first, in some
        # Eager attention to nothing but padding is NaN in fp64.
        model = lively(name).to(torch.float64 if attention == "sdpa" else torch.float32).train()
        model.set_attn_implementation(attention)
        model.gradient_checkpointing_enable()
        next(model.children()).eval()
        own, modes = model.generation_config, [module.training for module in model.modules()]
        for _ in range(rollouts):
            engine.generate(model, prompts(1), Sampling(5), [1], 0)
            assert [module.training for module in model.modules()] == modes
            assert model.is_gradient_checkpointing
            assert model.config._attn_implementation == attention
            assert model.generation_config is own
            assert "forward" not in model.__dict__
        assert torch.is_grad_enabled()
        ids = torch.tensor([[2, 3, 4, 5, 6, 7]])
        torch.manual_seed(3)  # dropout
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=0, atol=0)


def test_dropout_is_off(engine: RolloutEngine) -> None:
    model = sharpen(make_gpt2()).double().train()
    drawn = [engine.generate(model, prompts(2), greedy(8), [], PAD) for _ in range(2)]
    assert same(*drawn)


def test_training_may_begin_with_a_validation(engine: RolloutEngine) -> None:
    """Lightning validates in inference mode, whose tensors are unfit for what follows."""
    model = lively("llama").train()
    with torch.inference_mode():
        engine.generate(model, prompts(1), greedy(3), [], 0)
    rollout = engine.generate(model, prompts(1), Sampling(5), [], 0)
    assert not any(t.is_inference() for t in (rollout.ids_BT, rollout.mask_BT, rollout.truncated_B))
    model(input_ids=rollout.ids_BT, use_cache=False).logits.sum().backward()


@pytest.mark.parametrize("name", OWN_WEIGHTS)
def test_autocast_holds_in_the_rollout(name: str) -> None:
    model, given = lively("llama").float(), [*prompts(1), [2, 3, 4, 5] * 75]
    dtypes: set[torch.dtype] = set()
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        found = ENGINES[name]().generate(model, given, greedy(6), SOME, 0)
        expected = REFERENCE.generate(model, given, greedy(6), SOME, 0)
        assert not torch.is_autocast_cache_enabled()
    assert found.completions() == expected.completions()
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("name", OWN_WEIGHTS)
def test_an_update_within_the_same_autocast_is_seen(name: str) -> None:
    model, given, engine = lively("llama").float(), prompts(1), ENGINES[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        before = engine.generate(model, given, greedy(8), [], 0)
        write_behind_the_counters(model)
        after = engine.generate(model, given, greedy(8), [], 0)
        assert before.completions() != after.completions()
        assert same(after, REFERENCE.generate(model, given, greedy(8), [], 0))


# ---------------------------------------------------------------- the protocol


def test_completions_are_padded_on_the_right(engine: RolloutEngine) -> None:
    torch.manual_seed(0)
    rollout = engine.generate(make_model(), [PROMPT] * 40, Sampling(6), [EOS, 9, 12], PAD)
    assert (rollout.mask_BT[:, 1:] <= rollout.mask_BT[:, :-1]).all()
    for ids, truncated in zip(rollout.completions(), rollout.truncated_B.tolist(), strict=True):
        assert truncated == (ids[-1] not in (EOS, 9, 12))
        assert not {EOS, 9, 12} & set(ids[:-1])
        assert len(ids) == 6 or not truncated
    assert 0 < rollout.truncated_B.sum() < 40


def test_logps_are_those_of_the_distribution_drawn_from(engine: RolloutEngine) -> None:
    model, sampling = sharpen(make_model()).double(), Sampling(1, temperature=0.7, top_k=4)
    rollout = engine.generate(model, [PROMPT] * 20, sampling, [EOS], PAD)
    if rollout.logps_BT is None:  # the student's own
        assert not isinstance(engine, VLLMEngine)
        return
    probs = next_probs(model, PROMPT, 0.7)
    kept = torch.where(probs >= probs.topk(4).values[-1], probs, 0.0)
    expected = (kept / kept.sum()).log()[rollout.ids_BT[:, 0]]
    torch.testing.assert_close(rollout.logps_BT[:, 0], expected.float())
    assert rollout.logps_BT.dtype == torch.float32
