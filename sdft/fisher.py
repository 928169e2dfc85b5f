"""The diagonal of the Fisher information of a language model's responses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdft.losses import token_cross_entropy
from sdft.respondent import Respondent
from sdft.rollout import Rollout, Sampling, evaluation_mode
from sdft.seeding import derive_seed
from sdft.sharding import is_sharded
from sdft.weights import trained_parameters


def diagonal_fisher(
    module: Respondent, prompts: Sequence[Sequence[int]], seed: int
) -> dict[str, Tensor]:
    """E over prompts x, and responses y that the model samples itself, of (∂ log p(y|x) / ∂θ)².

    The true Fisher information at the weights as they are: the responses come from the model's own
    distribution (temperature 1, the whole vocabulary), not from the data. One response per prompt,
    and one gradient per response, since the square of a batch's gradient is something else. Dropout
    is off. Gradients and modes of the model stay as they are; torch's generator is seeded anew.

    Args:
        module: Its model answers, with at most `module.greedy.max_new_tokens` tokens.
        prompts: Encoded prompts, at least one.
        seed: Draws the responses.

    Returns:
        For each trained parameter of the model, by its name, a tensor of its shape; fp32.
    """
    assert len(prompts) > 0
    parameters = trained_parameters(module.model)
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    with evaluation_mode(module.model), module.forward_precision(), torch.enable_grad():
        for place, prompt in enumerate(prompts):
            torch.manual_seed(derive_seed(seed, place))
            response = module.sample(module.model, [prompt], Sampling(module.greedy.max_new_tokens))
            likelihood = response_likelihood(module, prompt, response)
            gradients = _gradients(module, likelihood, list(parameters.values()))
            for total, gradient in zip(totals.values(), gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient.float(), gradient.float(), value=1 / len(prompts))
    return totals


def _gradients(
    module: Respondent, value: Tensor, parameters: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The value's gradient with respect to each parameter, None where it has none."""
    if not is_sharded(module.model):
        return torch.autograd.grad(value, parameters, allow_unused=True)
    # Only a backward pass reaches shards. All processes have the same value: its mean is it.
    kept = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        value.backward()
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient


def response_likelihood(module: Respondent, prompt: Sequence[int], response: Rollout) -> Tensor:
    """log p(y|x), a scalar: the sum over the tokens of one response."""
    logits_BTV = module.logits(module.model, [prompt], response)
    return -token_cross_entropy(logits_BTV, response.ids_BT)[response.mask_BT].sum()
