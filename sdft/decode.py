"""The default rollout engine: its own decode loop over the Hugging Face forward.

Against `model.generate` it saves the sampler's cost (one inverse-CDF look-up in place of
`torch.multinomial`), and computes nothing for rows that have ended.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sdft.batch import pad
from sdft.rollout import (
    GenerateEngine,
    Rollout,
    RolloutEngine,
    Sampling,
    as_rollout,
    evaluation_mode,
)

_SHRINK_BELOW = 0.75  # share of live rows at which dropping the ended ones repays copying the cache


class DecodeEngine(RolloutEngine):
    """Rollouts by forward passes with a key-value cache, dropping rows as they end.

    Models whose forward takes no such cache (recurrent ones) go through `model.generate`.
    """

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
        if not _takes_cache(model):
            return GenerateEngine().generate(model, prompts, sampling, eos_ids, pad_id)
        with evaluation_mode(model):
            ids_BT = _Decoding(model, prompts, sampling, eos_ids, pad_id).run()
        return as_rollout(ids_BT, eos_ids, sampling.max_new_tokens)


class _Decoding:
    """One batch under way; `rows` are the places in the batch of the rows still computed."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        eos_ids: Sequence[int],
        pad_id: int,
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.eos_E = torch.tensor(list(eos_ids), device=model.device)
        self.prompt_BT, mask_BT = pad(prompts, pad_id, "left", model.device)
        self.mask_RT = mask_BT.long()
        size = len(prompts)
        self.rows = torch.arange(size, device=model.device)
        self.live_R = torch.ones(size, dtype=torch.bool, device=model.device)
        self.output_BT = self.prompt_BT.new_full((size, sampling.max_new_tokens), pad_id)
        self.cache = DynamicCache(config=model.config)
        accepted = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.takes_keep = "logits_to_keep" in accepted

    def run(self) -> Tensor:
        """Token ids `[B, T]`, T the longest completion; what follows an end is padding."""
        positions_RT = (self.mask_RT.cumsum(-1) - 1).clamp(min=0)
        logits_RV = self._forward(self.prompt_BT, positions_RT)
        for step in range(self.sampling.max_new_tokens):
            ids_R = draw(logits_RV, self.sampling, self._uniform())
            self.output_BT[self.rows[self.live_R], step] = ids_R[self.live_R]
            self.live_R = self.live_R & ~torch.isin(ids_R, self.eos_E)
            live = int(self.live_R.sum())
            if live == 0 or step + 1 == self.sampling.max_new_tokens:
                return self.output_BT[:, : step + 1]
            if live <= _SHRINK_BELOW * len(self.rows):
                ids_R = self._shrink(ids_R)
            self.mask_RT = torch.cat([self.mask_RT, self.mask_RT.new_ones(len(ids_R), 1)], dim=1)
            logits_RV = self._forward(ids_R[:, None], self.mask_RT.sum(-1, keepdim=True) - 1)
        raise AssertionError("max_new_tokens is at least 1")

    def _forward(self, ids_RT: Tensor, positions_RT: Tensor) -> Tensor:
        """Logits `[R, V]` of the token after the last."""
        optional: dict[str, Any] = {}
        if self.takes_positions:
            optional["position_ids"] = positions_RT
        if self.takes_keep:
            optional["logits_to_keep"] = 1
        logits: Tensor = self.model(
            input_ids=ids_RT,
            attention_mask=self.mask_RT,
            past_key_values=self.cache,
            use_cache=True,
            **optional,
        ).logits
        return logits[:, -1]

    def _uniform(self) -> Tensor:
        # One number for every row of the batch, ended or not: a row's draws do not depend on when
        # its neighbours end.
        return torch.rand(len(self.output_BT), device=self.rows.device)[self.rows]

    def _shrink(self, ids_R: Tensor) -> Tensor:
        keep = self.live_R.nonzero().squeeze(1)
        self.cache.batch_select_indices(keep)
        self.rows, self.mask_RT = self.rows[keep], self.mask_RT[keep]
        self.live_R = self.live_R[keep]
        return ids_R[keep]


def draw(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution; the likeliest when greedy.

    Args:
        logits_BV: Any float dtype; computed in fp32.
        sampling: Temperature, top-k, top-p, in this order.
        uniform_B: Uniform numbers in [0, 1).

    Returns:
        Token ids `[B]`. A token of probability 0 is never drawn.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        lowest_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < lowest_B1, -math.inf)
    if sampling.top_p < 1:
        logits_BV = _keep_top_p(logits_BV, sampling.top_p)
    cumulative_BV = logits_BV.softmax(-1).cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    # Strictly below the total, whatever the rounding: the look-up then ends at a possible token.
    below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    target_B1 = torch.minimum(uniform_B[:, None] * total_B1, below_B1)
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)


def _keep_top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    """Rule out all but the likeliest tokens that together reach `top_p`."""
    ordered_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    probabilities_BV = ordered_BV.softmax(-1)
    before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
    ordered_BV = ordered_BV.masked_fill(before_BV >= top_p, -math.inf)
    return torch.empty_like(logits_BV).scatter_(-1, order_BV, ordered_BV)


def _takes_cache(model: PreTrainedModel) -> bool:
    stateful = bool(getattr(model, "_is_stateful", False))
    return not stateful and "past_key_values" in inspect.signature(model.forward).parameters
