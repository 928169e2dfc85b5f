"""Next-token logits of prompts under way, token by token, from a model's own forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.batch import pad
from sdft.kv_cache import PreallocatedCache, attention_windows

_MASK_BLOCK = 64  # tokens for which a mask is laid out ahead


class Forward(Protocol):
    """R prompts that grow by a token at a time.

    Logits are `[R, V]` or in K blocks `[R, K, V / K]`, as `sdft.sampler.draw` takes them; the last
    block may go on behind the vocabulary with −inf.

    Attributes:
        capturable: Whether `step` is free of host decisions while `reserve` returns false, as CUDA
            graphs demand.
        stateless: Whether the passes leave no tensor behind in the model, which inference mode
            would make unfit for training.
    """

    capturable: bool
    stateless: bool

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; logits of the tokens that follow them."""

    def reserve(self) -> bool:
        """Make room for the next step; whether memory moved."""

    def step(self, ids_R: Tensor) -> Tensor:
        """Append one token to every row; logits of the tokens that follow."""

    def select(self, rows_K: Tensor) -> None:
        """Keep these rows, in this order; a row may be kept several times."""


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether the model's forward pass works with keys and values alone."""
    stateful = bool(getattr(model, "_is_stateful", False))
    return not stateful and _cache_name(model) != "" and attention_windows(model.config) is not None


def _cache_name(model: PreTrainedModel) -> str:
    accepted = inspect.signature(model.forward).parameters
    # Newer transformers renames it.
    return next((name for name in ("cache", "past_key_values") if name in accepted), "")


def sub_batches(lengths: Sequence[int], most_tokens: int, most_padding: int) -> Iterator[list[int]]:
    """Rows of similar length, the longest first.

    Args:
        lengths: Tokens of each row.
        most_tokens: Longest sub-batch, padding included, unless it is a single row.
        most_padding: Padding up to which another sub-batch does not pay.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    rows: list[int] = []
    padding = 0
    for row in order:
        longest = lengths[rows[0]] if rows else 0
        padding += longest - lengths[row]
        if rows and (padding > most_padding or longest * (len(rows) + 1) > most_tokens):
            yield rows
            rows, padding = [], 0
        rows.append(row)
    if rows:
        yield rows


def prefill_limits(device: torch.device) -> tuple[int, int]:
    """`most_tokens` and `most_padding` of `sub_batches` for prompts."""
    return (4096, 128) if device.type == "cpu" else (16384, 2048)


class ModelForward(Forward):
    """Through the model's `forward`: whatever the architecture, its hooks and its adapters.

    Args:
        model: Its forward pass takes a cache (`takes_cache`).
        pad_id: Fills the padding; any id does.
    """

    capturable = False
    stateless = False

    def __init__(self, model: PreTrainedModel, pad_id: int) -> None:
        self.model = model
        self.pad_id = pad_id
        accepted = inspect.signature(model.forward).parameters
        self.cache_name = _cache_name(model)
        self.takes_positions = "position_ids" in accepted
        self.options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in accepted:
            self.options["logits_to_keep"] = 1

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts, those of similar length together."""
        device = self.model.device
        self.lengths = [len(prompt) for prompt in prompts]
        self.added = 0
        windows = attention_windows(self.model.config)
        assert windows is not None
        self.cache = PreallocatedCache(windows, len(prompts), max(self.lengths))
        groups = list(sub_batches(self.lengths, *prefill_limits(device)))
        logits = [self._prefill(group, [prompts[row] for row in group]) for group in groups]
        self.position_R1 = torch.tensor(self.lengths, device=device)[:, None]
        self._lay_out()
        order_R = torch.tensor([row for group in groups for row in group], device=device)
        return torch.cat(logits)[order_R.argsort()]

    def _prefill(self, rows: list[int], prompts: list[Sequence[int]]) -> Tensor:
        device = self.model.device
        ids_RT, mask_RT = pad(prompts, self.pad_id, "left", device)
        self.cache.begin_prompts(torch.tensor(rows, device=device), ids_RT.shape[1])
        positions_RT = (mask_RT.long().cumsum(-1) - 1).clamp(min=0)
        ragged = len({len(prompt) for prompt in prompts}) > 1
        return self._logits(ids_RT, mask_RT.long() if ragged else None, positions_RT)

    def _lay_out(self) -> None:
        """Show the columns that some row fills; mask what stands before the shorter ones."""
        longest = max(self.lengths)
        self.cache.begin_tokens(longest + self.added)
        self.mask_RT: Tensor | None = None
        if min(self.lengths) < longest:
            columns_T = torch.arange(longest + self.added + _MASK_BLOCK, device=self.model.device)
            before_R1 = longest + self.added - self.position_R1
            self.mask_RT = (columns_T >= before_R1).long()

    def reserve(self) -> bool:
        """Make room for the next step."""
        self.cache.reserve()
        if self.mask_RT is not None and self.cache.shown == self.mask_RT.shape[1]:
            self._lay_out()
        return False

    def step(self, ids_R: Tensor) -> Tensor:
        """Append one token to every row."""
        mask_RT = self.mask_RT if self.mask_RT is None else self.mask_RT[:, : self.cache.shown + 1]
        logits_RV = self._logits(ids_R[:, None], mask_RT, self.position_R1)
        self.position_R1.add_(1)
        self.added += 1
        return logits_RV

    def select(self, rows_K: Tensor) -> None:
        """Keep these rows."""
        self.cache.batch_select_indices(rows_K)
        self.position_R1 = self.position_R1[rows_K]
        self.lengths = [self.lengths[row] for row in rows_K.tolist()]
        self._lay_out()

    def _logits(self, ids_RT: Tensor, mask_RT: Tensor | None, positions_RT: Tensor) -> Tensor:
        options = {**self.options, self.cache_name: self.cache}
        if self.takes_positions:
            options["position_ids"] = positions_RT
        logits: Tensor = self.model(input_ids=ids_RT, attention_mask=mask_RT, **options).logits
        return logits[:, -1]
