"""Keys and values of rows of differing length, and attention of one new token per row to them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_EXACT = (torch.float32, torch.float64)


class RowCache:
    """Token t of row r stands in column t, whatever the other rows' lengths.

    Shapes: R rows, T tokens, H query heads, K key-value heads, D head size, C columns.

    Args:
        shape: Layers, K, D.
        lengths: Tokens that each row begins with.
        more: Tokens that each row gets at most.
        like: Gives dtype and device.
        fixed: Let a step see all columns there are, filled or not, as a CUDA graph needs it.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        lengths: Sequence[int],
        more: int,
        like: Tensor,
        fixed: bool,
    ) -> None:
        self.lengths = list(lengths)
        self.fixed = fixed
        self.block = 256 if fixed else 64  # columns by which it grows
        self.added = 0
        self.limit = self.columns + more
        self.capacity = self._rounded(self.columns + 1)
        layers, heads, size = shape
        room = (len(self.lengths), heads, self.capacity, size)
        # Zeros: what is masked must be finite.
        self.keys = [like.new_zeros(room) for _ in range(layers)]
        self.values = [like.new_zeros(room) for _ in range(layers)]
        self.position_R = torch.tensor(self.lengths, device=like.device)
        self._lay_out()

    @property
    def columns(self) -> int:
        """Columns that the longest row fills."""
        return max(self.lengths) + self.added

    def _rounded(self, columns: int) -> int:
        blocks = -(-columns // self.block) * self.block
        return blocks if self.fixed else min(blocks, self.limit)

    def _lay_out(self) -> None:
        """Derive from capacity and positions where the next tokens go and what is masked."""
        rows, heads, _, _ = self.keys[0].shape
        device = self.position_R.device
        first_R = torch.arange(rows, device=device) * self.capacity
        first_RK = torch.arange(rows * heads, device=device).view(rows, heads) * self.capacity
        self.place_R = first_R + self.position_R
        self.place_N = (first_RK + self.position_R[:, None]).view(-1)
        self.mask_RC: Tensor | None = None
        if self.fixed or min(self.lengths) < max(self.lengths):
            column_C = torch.arange(self.capacity, device=device)
            mask_RC = self.keys[0].new_zeros(rows, self.capacity)
            self.mask_RC = mask_RC.masked_fill_(column_C >= self.position_R[:, None], -math.inf)

    def store(self, layer: int, rows_R: Tensor, keys_RTKD: Tensor, values_RTKD: Tensor) -> None:
        """Fill the first columns of some rows."""
        columns = slice(keys_RTKD.shape[1])
        for states, new_RTKD in ((self.keys, keys_RTKD), (self.values, values_RTKD)):
            new_RKTD = new_RTKD.transpose(1, 2).to(states[layer].dtype)
            states[layer][rows_R, :, columns] = new_RKTD

    def reserve(self) -> bool:
        """Count one more column, and make room for it; whether memory moved."""
        self.added += 1
        if self.columns <= self.capacity:
            return False
        old, self.capacity = self.capacity, self._rounded(self.columns)
        for states in (self.keys, self.values):
            for layer, filled in enumerate(states):
                states[layer] = F.pad(filled, (0, 0, 0, self.capacity - old))
        self._lay_out()
        return True

    def begin_step(self) -> None:
        """Unmask the column that each row's new token takes."""
        if self.mask_RC is not None:
            self.mask_RC.view(-1).index_fill_(0, self.place_R, 0.0)

    def end_step(self) -> None:
        """Every row has got a token."""
        for places in (self.position_R, self.place_R, self.place_N):
            places.add_(1)

    def append(self, layer: int, keys_R1KD: Tensor, values_R1KD: Tensor) -> None:
        """Store the new token of every row."""
        for states, new_R1KD in ((self.keys, keys_R1KD), (self.values, values_R1KD)):
            flat_ND = states[layer].view(-1, new_R1KD.shape[-1])
            new_ND = new_R1KD.reshape(-1, new_R1KD.shape[-1])
            flat_ND.index_copy_(0, self.place_N, new_ND.to(flat_ND.dtype))

    def attend(self, layer: int, queries_R1HD: Tensor, scale: float) -> Tensor:
        """Attention of the new tokens to their rows, `[R, 1, H · D]`."""
        shown = self.capacity if self.fixed else self.columns
        keys_RKTD = self.keys[layer][:, :, :shown]
        values_RKTD = self.values[layer][:, :, :shown]
        rows, heads, _, size = keys_RKTD.shape
        # The query heads that share a key-value head, as if they were queries of its own.
        queries_RKGD = queries_R1HD.view(rows, heads, -1, size).to(keys_RKTD.dtype)
        mask_R1T = None if self.mask_RC is None else self.mask_RC[:, None, :shown]
        if self.fixed or keys_RKTD.dtype not in _EXACT:
            mask_R11T = None if mask_R1T is None else mask_R1T[:, None]
            context_RKGD = F.scaled_dot_product_attention(
                queries_RKGD, keys_RKTD, values_RKTD, attn_mask=mask_R11T, scale=scale
            )
            return context_RKGD.reshape(rows, 1, -1)
        # On the CPU two products take a third of the time of the kernel for many queries.
        keys_NTD, values_NTD = keys_RKTD.flatten(0, 1), values_RKTD.flatten(0, 1)
        queries_NGD = queries_RKGD.flatten(0, 1)
        nothing = queries_NGD.new_empty(1, 1, 1)
        scores_NGT = torch.baddbmm(
            nothing, queries_NGD, keys_NTD.transpose(1, 2), beta=0, alpha=scale
        )
        if mask_R1T is not None:
            scores_NGT.view(rows, -1, shown).add_(mask_R1T)
        return torch.bmm(scores_NGT.softmax(-1), values_NTD).view(rows, 1, -1)

    def select(self, rows_S: Tensor) -> None:
        """Keep these rows, in this order."""
        for states in (self.keys, self.values):
            for layer, old in enumerate(states):
                states[layer] = old.index_select(0, rows_S)
        self.position_R = self.position_R[rows_S]
        self.lengths = [self.lengths[row] for row in rows_S.tolist()]
        self._lay_out()
