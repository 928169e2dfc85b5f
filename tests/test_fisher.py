"""The Fisher information of sampled responses, against enumeration and against one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import echo_examples, make_method, make_module, save_model, sharpen
from torch import Tensor

from sdft import StudentModule
from sdft.fisher import diagonal_fisher
from sdft.methods import SFTModule
from sdft.rollout import Sampling
from sdft.seeding import derive_seed


def build(folder: Path, tokens: int = 4, factor: float = 6.0) -> StudentModule:
    module = make_method(SFTModule, folder, max_new_tokens=tokens)
    sharpen(module.model, factor)
    return module


def prompts_of(module: StudentModule, count: int) -> list[list[int]]:
    return [module.encoder.student_ids(example) for example in echo_examples(count)]


def squared_gradient(module: StudentModule, prompt: list[int], response: list[int]) -> list[Tensor]:
    """(∂ log p(response | prompt) / ∂θ)² by a plain backward pass, then log p itself."""
    module.model.zero_grad()
    logits = module.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    likelihood = logits.log_softmax(-1)[range(len(response)), response].sum()
    likelihood.backward()
    found = [p.grad.square() for p in module.model.parameters()]  # type: ignore[union-attr]
    module.model.zero_grad()
    return [*found, likelihood.detach()]


def test_it_is_the_mean_of_squared_gradients_of_one_response_each(model_dir: Path) -> None:
    module = build(model_dir)
    prompts = prompts_of(module, 3)
    found = diagonal_fisher(module, prompts, seed=5)
    sums: list[Tensor] | None = None
    for place, prompt in enumerate(prompts):
        torch.manual_seed(derive_seed(5, place))
        sampled = module.sample(module.model, [prompt], Sampling(4)).completions()[0]
        *squares, _ = squared_gradient(module, prompt, sampled)
        sums = squares if sums is None else [a + b for a, b in zip(sums, squares, strict=True)]
    assert sums is not None
    assert list(found) == [name for name, _ in module.model.named_parameters()]
    for value, total in zip(found.values(), sums, strict=True):
        torch.testing.assert_close(value, total / 3, rtol=1e-3, atol=1e-6)
    assert sum(float(value.sum()) for value in found.values()) > 1e-2


def test_it_is_the_true_fisher_of_the_models_own_distribution(tmp_path: Path) -> None:
    """Against the sum over every possible response, weighted by its probability."""
    module = build(save_model(tmp_path, num_hidden_layers=1), tokens=1)
    prompt = prompts_of(module, 1)[0]
    exact = [torch.zeros_like(p) for p in module.model.parameters()]
    mass = 0.0
    for token in range(module.model.config.vocab_size):
        *squares, likelihood = squared_gradient(module, prompt, [token])
        mass += float(likelihood.exp())
        for total, square in zip(exact, squares, strict=True):
            total += likelihood.exp() * square
    assert mass == pytest.approx(1.0, abs=1e-5)
    found = diagonal_fisher(module, [prompt] * 300, seed=0)
    estimate = torch.cat([value.flatten() for value in found.values()])
    expected = torch.cat([value.flatten() for value in exact])
    assert float(estimate.sum() / expected.sum()) == pytest.approx(1.0, abs=0.25)
    stacked = torch.stack([estimate, expected])
    assert float(torch.corrcoef(stacked)[0, 1]) > 0.97
    likeliest = int(module.model(torch.tensor([prompt])).logits[0, -1].argmax())
    *greedy, _ = squared_gradient(module, prompt, [likeliest])
    empirical = torch.cat([value.flatten() for value in greedy])
    assert not 0.6 < float(empirical.sum() / expected.sum()) < 1.4, "one fixed answer is another"


def test_it_is_a_function_of_the_seed_alone(model_dir: Path) -> None:
    module = build(model_dir)
    prompts = prompts_of(module, 2)
    one = diagonal_fisher(module, prompts, seed=1)
    torch.rand(5)
    again = diagonal_fisher(module, prompts, seed=1)
    other = diagonal_fisher(module, prompts, seed=2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_it_leaves_no_trace_and_drops_nothing_out(gpt2_dir: Path) -> None:
    module = make_module(gpt2_dir)  # dropout while it trains
    module.configure_model()
    model = module.model
    model.transformer.h[0].eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prompts = prompts_of(module, 2)
    found = diagonal_fisher(module, prompts, seed=0)
    assert model.training
    assert not model.transformer.h[0].training
    assert model.transformer.h[1].training
    assert all(torch.equal(p.grad, torch.full_like(p, 2.0)) for p in model.parameters())  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    quiet = diagonal_fisher(module, prompts, seed=0)
    assert all(torch.equal(found[name], quiet[name]) for name in found)


def test_a_frozen_part_has_none_and_half_precision_gives_fp32(model_dir: Path) -> None:
    module = make_method(SFTModule, model_dir, dtype="bfloat16")
    module.model.get_input_embeddings().requires_grad_(False)
    found = diagonal_fisher(module, prompts_of(module, 1), seed=0)
    assert "model.embed_tokens.weight" not in found
    assert {value.dtype for value in found.values()} == {torch.float32}
