"""The default rollout engine: its own decode loop, several times as fast as `model.generate`.

It draws with one look-up per row, writes keys and values in place, reads equal prompts once and
computes nothing for rows that have ended. Weights are the student's own, or copies as old as the
rollout: nothing to synchronise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.direct import DirectForward, runs_directly
from sdft.draws import Uniform
from sdft.forward import Forward, ModelForward, takes_cache
from sdft.fused import FusedForward, can_fuse, fusing_pays
from sdft.graph import StepGraph
from sdft.rollout import (
    GenerateEngine,
    Rollout,
    RolloutEngine,
    Sampling,
    as_rollout,
    evaluation_mode,
    unwrapped,
)
from sdft.sampler import draw


class DecodeEngine(RolloutEngine):
    """Rollouts by a decode loop of our own.

    Llama-, Mistral-, Qwen2- and Qwen3-type decoders run on their weights without the general code
    around them, on CUDA as a captured graph, on a CPU with the weights laid out anew; every other
    model with keys and values through its `forward`; the rest (recurrent ones) through
    `model.generate`.

    Args:
        direct: Whether known decoders may do without their `forward`; false to compare.
        fused: Whether known decoders on a CPU run on copies of their weights, laid out for few
            rows, for as long as a rollout takes; where the copies pay and take at most 1 GiB when
            unset.
    """

    def __init__(self, direct: bool = True, fused: bool | None = None) -> None:
        self.direct, self.fused = direct, fused

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
        if not takes_cache(model):
            return GenerateEngine().generate(model, prompts, sampling, eos_ids, pad_id)
        device = model.device
        with evaluation_mode(model), _weights_cast_once(device.type):
            forward = self._forward(model, prompts[0], sampling.max_new_tokens, pad_id)
            # In inference mode autocast would cast the weights anew for every token.
            quick = forward.stateless and not torch.is_autocast_enabled(device.type)
            with torch.inference_mode(quick), torch.no_grad():
                output_BT = _Decoding(forward, prompts, sampling, eos_ids, device).run()
        return _trimmed(as_rollout(output_BT, eos_ids, sampling.max_new_tokens), pad_id)

    def _forward(
        self, model: PreTrainedModel, prompt: Sequence[int], new_tokens: int, pad_id: int
    ) -> Forward:
        if not self.direct or not runs_directly(model, prompt):
            return ModelForward(model, pad_id)
        wanted = fusing_pays(model, new_tokens) if self.fused is None else self.fused
        if wanted and can_fuse(model):
            return FusedForward(model, new_tokens)
        return DirectForward(model, new_tokens)


def _trimmed(rollout: Rollout, pad_id: int) -> Rollout:
    """As wide as the longest completion, with padding after each end."""
    ids_BT = rollout.ids_BT.masked_fill(~rollout.mask_BT, pad_id)
    return replace(rollout, ids_BT=ids_BT).trimmed()


def _pace(device: torch.device) -> tuple[int, float]:
    """Steps between two looks for ends, and the share of live rows at which the rest is dropped."""
    # A look waits for the device; to drop rows copies the cache, and costs a captured graph.
    return (1, 0.9) if device.type == "cpu" else (8, 0.5)


@contextmanager
def _weights_cast_once(device_type: str) -> Iterator[None]:
    """Under autocast, keep the cast weights for the whole rollout.

    Lightning's mixed precision turns autocast's cache off: every weight would be cast anew for
    every token. Dropped afterwards, for the optimizer is about to change the weights.
    """
    if not torch.is_autocast_enabled(device_type) or torch.is_autocast_cache_enabled():
        yield
        return
    dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, dtype=dtype, cache_enabled=True):
        try:
            yield
        finally:
            torch.clear_autocast_cache()


class _Decoding:
    """One batch under way; `rows_R` are the places in the batch of the rows still computed."""

    def __init__(
        self,
        forward: Forward,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        eos_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        self.forward = forward
        self.prompts = prompts
        self.sampling = sampling
        self.eos_E = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
        self.rows_R = torch.arange(len(prompts), device=device)
        self.ids_R = torch.zeros_like(self.rows_R)
        self.live_R = torch.ones_like(self.rows_R, dtype=torch.bool)
        self.place_R = self.rows_R.clone()  # in the flat output, of the next token
        self.output_TB = self.rows_R.new_zeros(sampling.max_new_tokens, len(prompts))
        # One number for every row of the batch, ended or not: a row's draws do not depend on when
        # its neighbours end.
        self.uniform = Uniform(len(prompts), device)
        self.look_every, self.shrink_at = _pace(device)
        self.graph = StepGraph() if forward.capturable else None

    def run(self) -> Tensor:
        """Token ids `[B, T]`; what follows an end is arbitrary."""
        self._begin()
        limit = self.sampling.max_new_tokens
        for step in range(1, limit):
            if step % self.look_every == 0 and self._all_ended():
                return self.output_TB[:step].T
            self._advance(limit - step)
        return self.output_TB.T

    def _begin(self) -> None:
        """Read each distinct prompt once, and draw the first tokens."""
        distinct = list(dict.fromkeys(map(tuple, self.prompts)))
        logits_RV = self.forward.prefill(distinct)
        if len(distinct) < len(self.prompts):
            place = {prompt: row for row, prompt in enumerate(distinct)}
            copies = [place[tuple(prompt)] for prompt in self.prompts]
            copies_R = torch.tensor(copies, device=self.rows_R.device)
            self.forward.select(copies_R)
            logits_RV = logits_RV[copies_R]
        if not logits_RV.flatten(1).amax(-1).isfinite().all():
            raise ValueError("the model's logits are not finite: its weights have diverged")
        self._roll()
        self._append(logits_RV)

    def _advance(self, left: int) -> None:
        if self.forward.reserve() and self.graph is not None:
            self.graph.forget()
        self._roll()
        if self.graph is None:
            self._step()
        else:
            self.graph.run(self._step, left)

    def _roll(self) -> None:
        if self.sampling.temperature > 0:
            self.uniform.draw()

    def _step(self) -> None:
        # Captured as a CUDA graph: in place, and without a decision of the host.
        self._append(self.forward.step(self.ids_R))

    def _append(self, logits_RV: Tensor) -> None:
        ids_R = draw(logits_RV, self.sampling, self.uniform.values_B[self.rows_R])
        self.ids_R.copy_(ids_R)
        self.output_TB.view(-1).index_copy_(0, self.place_R, ids_R)
        self.place_R.add_(self.output_TB.shape[1])
        self.live_R.logical_and_((ids_R[:, None] != self.eos_E).all(-1))

    def _all_ended(self) -> bool:
        """Whether nothing is left to do; drops ended rows where that pays."""
        live = int(self.live_R.sum())
        if 0 < live <= self.shrink_at * len(self.live_R):
            keep_K = self.live_R.nonzero().squeeze(1)
            self.forward.select(keep_K)
            for name in ("rows_R", "ids_R", "live_R", "place_R"):
                setattr(self, name, getattr(self, name)[keep_K])
            if self.graph is not None:
                self.graph.forget()
        return live == 0
