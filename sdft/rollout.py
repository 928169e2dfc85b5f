"""Rollouts: completions that the student samples for its own prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from sdft.batch import pad


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        max_new_tokens: Longest completion, in tokens, its end-of-sequence token included.
        temperature: Divides the logits; 0 is greedy.
        top_p: Keep the smallest set of tokens with at least this probability; 1 keeps all.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens must be at least 1", self.max_new_tokens)
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "temperature must be a finite number, 0 (greedy) or more",
            self.temperature,
        )
        _require(0 < self.top_p <= 1, "top_p must lie in (0, 1]", self.top_p)
        _require(self.top_k >= 0, "top_k must be 0 (keep all) or more", self.top_k)


def _require(condition: bool, rule: str, found: object) -> None:
    if not condition:
        raise ValueError(f"{rule}, found {found}")


@dataclass(frozen=True)
class Rollout:
    """B completions, padded on the right.

    Attributes:
        ids_BT: Token ids, an end-of-sequence token included where one was drawn.
        mask_BT: True at real tokens.
        truncated_B: True where the length limit ended the completion.
        logps_BT: Log-probabilities, fp32, of the tokens under the distribution that they were drawn
            from (temperature, top-p and top-k applied), 0 at padding; None means "drawn from the
            student as it is".
    """

    ids_BT: Tensor
    mask_BT: Tensor
    truncated_B: Tensor
    logps_BT: Tensor | None = None

    @property
    def lengths_B(self) -> Tensor:
        """Tokens per completion, `[B]`."""
        return self.mask_BT.sum(-1)

    def rows(self, rows: Sequence[int]) -> Rollout:
        """The completions of these rows, in this order; none loses a column."""
        chosen = list(rows)
        logps_BT = None if self.logps_BT is None else self.logps_BT[chosen]
        return Rollout(
            self.ids_BT[chosen], self.mask_BT[chosen], self.truncated_B[chosen], logps_BT
        )

    def trimmed(self) -> Rollout:
        """As wide as the longest completion."""
        longest = int(self.lengths_B.max())
        logps_BT = None if self.logps_BT is None else self.logps_BT[:, :longest]
        return Rollout(
            self.ids_BT[:, :longest], self.mask_BT[:, :longest], self.truncated_B, logps_BT
        )

    def completions(self) -> list[list[int]]:
        """The completions without their padding."""
        lengths = self.lengths_B.tolist()
        return [row[:length] for row, length in zip(self.ids_BT.tolist(), lengths, strict=True)]


class RolloutEngine(Protocol):
    """Anything that samples completions from a model as it is now."""

    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        eos_ids: Sequence[int],
        pad_id: int,
    ) -> Rollout:
        """Sample one completion per prompt; torch's global generator is the only randomness."""


class GenerateEngine(RolloutEngine):
    """Rollouts through `model.generate`: every architecture that transformers can decode.

    The model's own generation defaults (repetition penalty, top-k, forced tokens …) are kept out:
    they would change the distribution that the loss assumes.

    Args:
        cache_implementation: A cache of transformers, for example `static`; its default when unset.
    """

    def __init__(self, cache_implementation: str | None = None) -> None:
        self.cache_implementation = cache_implementation

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        eos_ids: Sequence[int],
        pad_id: int,
    ) -> Rollout:
        """Sample one completion per prompt (see `RolloutEngine`)."""
        model = unwrapped(model)
        ids_BT, mask_BT = pad(prompts, pad_id, "left", model.device)
        config = generation_config(sampling, eos_ids, pad_id)
        config.cache_implementation = self.cache_implementation
        with evaluation_mode(model), _only(model, config):
            output_BT = cast(Any, model).generate(
                inputs=ids_BT,
                attention_mask=mask_BT.long(),
                synced_gpus=False,  # a sharded model is whole here: processes need not wait
            )
        return as_rollout(output_BT[:, ids_BT.shape[1] :], eos_ids, sampling.max_new_tokens)


def unwrapped(model: Any) -> PreTrainedModel:
    """The model in peft's wrapper, its adapters included: the wrapper hides cache and settings."""
    wrapped = hasattr(model, "get_base_model") and not model.active_peft_config.is_prompt_learning
    return cast(PreTrainedModel, model.get_base_model() if wrapped else model)


def as_rollout(ids_BT: Tensor, eos_ids: Sequence[int], max_new_tokens: int) -> Rollout:
    """Mask what follows each completion's first end-of-sequence token."""
    ends_BT = torch.isin(ids_BT, torch.tensor(list(eos_ids), device=ids_BT.device))
    ended_before_BT = ends_BT.cumsum(-1) - ends_BT.long() > 0
    truncated_B = ~ends_BT.any(-1)
    assert not truncated_B.any() or ids_BT.shape[1] == max_new_tokens
    return Rollout(ids_BT, ~ended_before_BT, truncated_B)


def gathered_rollout(
    completions: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: Sequence[int],
    pad_id: int,
    device: torch.device,
    logps: Sequence[Sequence[float]] | None = None,
) -> Rollout:
    """A rollout from the lists of another library.

    Args:
        completions: B completions, the tokens that follow an end ignored.
        sampling: What was asked for.
        eos_ids: Token ids that end a completion.
        pad_id: Fills the padding.
        device: Where the result lives.
        logps: B lists of log-probabilities, one per token.

    Raises:
        ValueError: A completion stops without an end and below the length limit.
    """
    ends = set(eos_ids)
    cut = [_through_first(ids, ends) for ids in completions]
    open_B = [not ids or ids[-1] not in ends for ids in cut]
    for row, ids in enumerate(cut):
        if open_B[row] and len(ids) < sampling.max_new_tokens:
            raise ValueError(
                f"the rollout engine ended row {row} after {len(ids)} of {sampling.max_new_tokens} "
                "tokens without an end-of-sequence token: its context is too short for the prompt"
            )
    ids_BT, mask_BT = pad(cut, pad_id, "right", device)
    logps_BT = None
    if logps is not None:
        logps_BT = torch.zeros(ids_BT.shape, dtype=torch.float32)
        for row, ids in enumerate(cut):
            logps_BT[row, : len(ids)] = torch.tensor(logps[row][: len(ids)])
        logps_BT = logps_BT.to(device)
    return Rollout(ids_BT, mask_BT, torch.tensor(open_B, device=device), logps_BT)


def _through_first(ids: Sequence[int], ends: set[int]) -> list[int]:
    """The ids up to the first end, which is kept."""
    place = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return list(ids[: place + 1])


def generation_config(sampling: Sampling, eos_ids: Sequence[int], pad_id: int) -> GenerationConfig:
    """The settings of a rollout in transformers' words; nothing is left to a model's own ones."""
    sample = sampling.temperature > 0
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sample,
        temperature=sampling.temperature if sample else None,
        top_p=sampling.top_p if sample else None,
        top_k=sampling.top_k if sample else None,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode; afterwards every submodule has its mode from before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _only(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Only these generation settings; the model's own are restored afterwards."""
    # `generate` fills what a given config leaves open from the model's own one, hence the swap.
    own_config = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own_config
