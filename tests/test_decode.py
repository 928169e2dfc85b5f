"""Every way of decoding gives what `model.generate` gives, and leaves the model as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from conftest import WORDS, make_model
from decoders import (
    ALL,
    DIRECT,
    MANY,
    MODELS,
    NONE,
    SOME,
    greedy,
    lively,
    prompts,
    same,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from sdft.decode import DecodeEngine
from sdft.direct import DirectForward
from sdft.forward import ModelForward
from sdft.fused import FusedForward
from sdft.rollout import GenerateEngine, Rollout, Sampling

FUSED = {name for name in DIRECT if name != "llama3"}  # which has biases all over
ENGINES = {
    "decode": DecodeEngine(fused=False),
    "fused": DecodeEngine(fused=True),
    "by forward": DecodeEngine(direct=False),
}
FORWARDS: tuple[type, ...] = (DirectForward, FusedForward, ModelForward)
REFERENCE = GenerateEngine()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> DecodeEngine:
    return ENGINES[request.param]


# ---------------------------------------------------------------- greedy parity, in fp64


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eos_ids", [NONE, SOME, MANY, ALL], ids=["none", "some", "many", "all"])
def test_greedy_is_what_generate_gives(name: str, engine: DecodeEngine, eos_ids: list[int]) -> None:
    model = lively(name)
    found = engine.generate(model, prompts(len(eos_ids)), greedy(12), eos_ids, 0)
    assert same(found, REFERENCE.generate(model, prompts(len(eos_ids)), greedy(12), eos_ids, 0))


@pytest.mark.parametrize("name", MODELS)
def test_greedy_holds_for_long_ragged_prompts_and_completions(
    name: str, engine: DecodeEngine
) -> None:
    model = lively(name)
    given = [*prompts(3, count=3), [2, 3, 4, 5] * 75, *prompts(4, count=2, longest=120)]
    # Longer than a block of the caches and of the mask.
    expected = REFERENCE.generate(model, given, greedy(150), [], 0)
    assert expected.ids_BT.shape == (6, 150)
    assert same(engine.generate(model, given, greedy(150), [], 0), expected)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_follows_an_optimizer_step(name: str, engine: DecodeEngine) -> None:
    model = lively(name).train()
    given = prompts(5)
    before = engine.generate(model, given, greedy(8), [1], 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.tensor([[2, 3, 4, 5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = engine.generate(model, given, greedy(8), [1], 0)
    assert not same(before, after)
    assert same(after, REFERENCE.generate(model, given, greedy(8), [1], 0))


@pytest.mark.parametrize("name", MODELS)
def test_a_row_does_not_depend_on_its_company(name: str, engine: DecodeEngine) -> None:
    model = lively(name)
    given = [*prompts(6), [3] * 200]
    together = engine.generate(model, given, greedy(10), SOME, 0).completions()
    for prompt, completion in zip(given, together, strict=True):
        alone = engine.generate(model, [prompt], greedy(10), SOME, 0)
        assert alone.completions() == [completion]


@pytest.mark.parametrize("name", MODELS)
def test_equal_prompts_are_read_once(
    name: str, engine: DecodeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = lively(name), prompts(7)
    repeated = [prompt for prompt in given for _ in range(3)]
    expected = REFERENCE.generate(model, repeated, greedy(8), SOME, 0)
    engine.generate(model, given, greedy(1), [], 0)  # the first time logits are compared
    rows: list[int] = []
    for forward in FORWARDS:
        watch(monkeypatch, forward, "prefill", lambda _, prompts: rows.append(len(prompts)))
    assert same(engine.generate(model, repeated, greedy(8), SOME, 0), expected)
    assert rows == [len({tuple(prompt) for prompt in given})]


def watch(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, note: Callable[..., Any]
) -> None:
    """Call `note` before each call of the method."""
    method = getattr(owner, name)

    def noted(*args: Any, **options: Any) -> Any:
        note(*args, **options)
        return method(*args, **options)

    monkeypatch.setattr(owner, name, noted)


def test_logits_that_are_not_finite_are_an_error(engine: DecodeEngine) -> None:
    model = lively("llama")
    model.lm_head.weight.data[3] = torch.nan
    for sampling in (Sampling(4), greedy(4)):
        with pytest.raises(ValueError, match="not finite"):
            engine.generate(model, prompts(1), sampling, [1], 0)


# ---------------------------------------------------------------- which way a model goes


@pytest.mark.parametrize("name", MODELS)
def test_no_model_with_keys_and_values_goes_through_generate(
    name: str, engine: DecodeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively(name)
    monkeypatch.setattr(model, "generate", None)
    steps: list[type] = []
    for forward in FORWARDS:
        watch(monkeypatch, forward, "step", lambda self, _: steps.append(type(self)))
    engine.generate(model, prompts(1), greedy(1), [], 0)  # the first time logits are compared
    steps.clear()
    engine.generate(model, prompts(1), greedy(5), [], 0)
    expected: type = ModelForward
    if engine.direct and name in DIRECT:
        expected = FusedForward if engine.fused and name in FUSED else DirectForward
    assert set(steps) == {expected}


@pytest.mark.parametrize(
    ("tokens", "most", "chosen"),
    [(16, 2**30, FusedForward), (15, 2**30, DirectForward), (16, 2**10, DirectForward)],
)
def test_weights_are_copied_where_that_pays(
    tokens: int, most: int, chosen: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively("llama")
    monkeypatch.setattr("sdft.fused.MOST_BYTES", most)
    assert type(DecodeEngine()._forward(model, [2, 3], tokens, 0)) is chosen


def test_a_model_in_half_precision_is_not_copied() -> None:
    model = lively("llama").bfloat16()
    assert type(DecodeEngine(fused=True)._forward(model, [2, 3], 40, 0)) is DirectForward


def test_a_recurrent_model_goes_through_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": len(WORDS)}
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(**shape, pad_token_id=0, eos_token_id=1)).eval()
    calls: list[int] = []
    watch(monkeypatch, GenerateEngine, "generate", lambda *_: calls.append(1))
    found = DecodeEngine().generate(model, [[3, 4], [5, 6]], greedy(4), [1], 0)
    assert same(found, REFERENCE.generate(model, [[3, 4], [5, 6]], greedy(4), [1], 0))
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_in_pefts_wrapper_are_decoded_with(
    name: str, engine: DecodeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    plain = engine.generate(lively(name), prompts(1), greedy(8), SOME, 0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(lively(name), config).double().eval()
    expected = REFERENCE.generate(model, prompts(1), greedy(8), SOME, 0)
    monkeypatch.setattr(GenerateEngine, "generate", None)
    assert same(engine.generate(model, prompts(1), greedy(8), SOME, 0), expected)
    assert not same(plain, expected)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("name", MODELS)
def test_draws_depend_on_the_seed_the_row_and_the_step_alone(
    name: str, engine: DecodeEngine
) -> None:
    model = lively(name).float()
    for parameter in model.parameters():
        parameter.data.div_(3)
    given = prompts(1, count=8)
    free = seeded(engine, model, given, NONE).completions()
    ended = seeded(engine, model, given, [2, 3, 4, 5, 6]).completions()
    assert [len(ids) for ids in ended] != [len(ids) for ids in free]
    assert ended == [whole[: len(ids)] for whole, ids in zip(free, ended, strict=True)]
    # A shorter batch: the rows that remain at their places draw the same first tokens.
    first = seeded(engine, model, given[:3], NONE).completions()
    assert [ids[0] for ids in first] == [ids[0] for ids in free[:3]]
    assert seeded(engine, model, given, NONE, seed=12).completions() != free


def test_every_way_draws_the_same() -> None:
    model, given = lively("qwen2"), prompts(2, count=8)
    first, *others = (seeded(engine, model, given, SOME) for engine in ENGINES.values())
    assert all(same(first, other) for other in others)


def seeded(
    engine: DecodeEngine,
    model: PreTrainedModel,
    given: list[list[int]],
    eos_ids: list[int],
    seed: int = 11,
) -> Rollout:
    torch.manual_seed(seed)
    return engine.generate(model, given, Sampling(10), eos_ids, 0)


def test_greedy_draws_no_random_number(engine: DecodeEngine) -> None:
    model, given = make_model(), prompts(1)
    before = torch.get_rng_state()
    engine.generate(model, given, greedy(3), [1], 0)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- what is left behind


@pytest.mark.parametrize("name", MODELS)
def test_the_model_trains_on_as_if_nothing_had_been_generated(
    name: str, engine: DecodeEngine
) -> None:
    """No mode, setting or tensor of the rollouts stays in the model."""
    gradients = []
    for rollouts in (False, True):
        model = lively(name).train()
        model.gradient_checkpointing_enable()
        implementation, own = model.config._attn_implementation, model.generation_config
        modes = [module.training for module in model.modules()]
        if rollouts:
            engine.generate(model, prompts(1), Sampling(5), [1], 0)
        assert [module.training for module in model.modules()] == modes
        assert model.is_gradient_checkpointing
        assert model.config._attn_implementation == implementation
        assert model.generation_config is own
        ids = torch.tensor([[2, 3, 4, 5, 6, 7]])
        torch.manual_seed(3)  # dropout
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_completions_can_be_trained_on(name: str, engine: DecodeEngine) -> None:
    model = lively(name).train()
    rollout = engine.generate(model, prompts(1), Sampling(5), [], 0)
    assert not any(t.is_inference() for t in (rollout.ids_BT, rollout.mask_BT, rollout.truncated_B))
    model(input_ids=rollout.ids_BT, use_cache=False).logits.sum().backward()


# ---------------------------------------------------------------- mixed precision


class WeightCasts(TorchDispatchMode):
    """Counts how often each parameter is copied to another precision."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.names = {weight.data_ptr(): name for name, weight in model.named_parameters()}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.names:
            self.counts[self.names[args[0].data_ptr()]] += 1
        return func(*args, **(kwargs or {}))


def lightnings_autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_autocast_casts_each_weight_once_per_rollout(
    name: str, engine: DecodeEngine, evaluating: bool
) -> None:
    model = MODELS[name]().eval()
    with lightnings_autocast(), torch.inference_mode(evaluating):
        engine.generate(model, prompts(1), greedy(1), [], 0)  # the first time logits are compared
        with WeightCasts(model) as casts:
            engine.generate(model, prompts(1), greedy(6), [], 0)
        assert casts.counts
        assert set(casts.counts.values()) == {1}
        assert not torch.is_autocast_cache_enabled()
        assert torch.is_inference_mode_enabled() == evaluating


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_autocast_gives_the_logits_of_the_forward_pass(name: str) -> None:
    model, given = MODELS[name]().eval(), prompts(1, count=8)
    logits = {}
    with lightnings_autocast(), torch.no_grad():
        for forward in (DirectForward(model, 4), ModelForward(model, 0)):
            steps = [forward.prefill(given)]
            for token in (2, 3, 4):
                forward.reserve()
                steps.append(forward.step(torch.full((8,), token)))
            logits[type(forward)] = torch.stack(steps)
    direct, expected = logits[DirectForward], logits[ModelForward]
    assert direct.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(direct, expected, rtol=0.03, atol=0.02)


def test_an_update_within_the_same_autocast_is_seen(engine: DecodeEngine) -> None:
    model, given = lively("llama").float(), prompts(1)
    with lightnings_autocast():
        before = engine.generate(model, given, greedy(8), [], 0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        after = engine.generate(model, given, greedy(8), [], 0)
    with lightnings_autocast():
        afresh = engine.generate(model, given, greedy(8), [], 0)
    assert not same(before, after)
    assert same(after, afresh)
