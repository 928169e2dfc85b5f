"""Keys and values of rows whose newest tokens share a column."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class AlignedCache:
    """Prompts end in one column, so a token of every row is written by one copy without an index.

    Shapes: R rows, T tokens, H query heads, K key-value heads, S head size.

    Args:
        shape: Layers, K, S.
        lengths: Tokens that each row begins with.
        more: Tokens that each row gets at most.
        like: Gives dtype and device.
    """

    def __init__(
        self, shape: tuple[int, int, int], lengths: Sequence[int], more: int, like: Tensor
    ) -> None:
        layers, heads, size = shape
        self.lengths = list(lengths)
        self.columns = max(self.lengths)
        """What the prompts fill, and then the tokens so far."""
        self.prompt = self.columns
        room = (len(self.lengths), heads, self.columns + more, size)
        # What lies ahead is written before it is shown, and costs no memory until then.
        self.keys = [like.new_empty(room) for _ in range(layers)]
        self.values = [like.new_empty(room) for _ in range(layers)]
        for states in (*self.keys, *self.values):
            states[:, :, : self.columns] = 0  # what is masked must be finite
        self._lay_out()

    def _lay_out(self) -> None:
        """Derive from the lengths which columns are shown and what of them is masked."""
        self.first = self.prompt - max(self.lengths)
        self.mask_R1P: Tensor | None = None
        if min(self.lengths) < max(self.lengths):
            column_P = torch.arange(self.first, self.prompt)
            before_R1 = self.prompt - torch.tensor(self.lengths)[:, None]
            mask_RP = self.keys[0].new_zeros(len(self.lengths), len(column_P))
            self.mask_R1P = mask_RP.masked_fill_(column_P < before_R1, -math.inf)[:, None]

    @property
    def position_R(self) -> Tensor:
        """Place of each row's next token in its own sequence."""
        return torch.tensor(self.lengths) + (self.columns - self.prompt)

    def store(
        self, layer: int, rows: Sequence[int], keys_RTKS: Tensor, values_RTKS: Tensor
    ) -> None:
        """Fill in the prompts of some rows, padded on the right."""
        for place, row in enumerate(rows):
            length = self.lengths[row]
            column = slice(self.prompt - length, self.prompt)
            self.keys[layer][row, :, column] = keys_RTKS[place, :length].transpose(0, 1)
            self.values[layer][row, :, column] = values_RTKS[place, :length].transpose(0, 1)

    def append(self, layer: int, keys_RKS: Tensor, values_RKS: Tensor) -> None:
        """Store the new token of every row."""
        self.keys[layer][:, :, self.columns] = keys_RKS
        self.values[layer][:, :, self.columns] = values_RKS

    def end_step(self) -> None:
        """Every row has got a token."""
        self.columns += 1

    def attend(self, layer: int, queries_RHS: Tensor) -> Tensor:
        """Attention of the new tokens, whose queries are scaled, to their rows: `[R, H · S]`."""
        shown = slice(self.first, self.columns + 1)
        keys_NTS = self.keys[layer][:, :, shown].flatten(0, 1)
        values_NTS = self.values[layer][:, :, shown].flatten(0, 1)
        # The query heads that share a key-value head, as if they were queries of its own.
        rows, _, size = queries_RHS.shape
        queries_NGS = queries_RHS.view(len(keys_NTS), -1, size)
        scores_NGT = torch.bmm(queries_NGS, keys_NTS.transpose(1, 2))
        if self.mask_R1P is not None:
            prompt = self.mask_R1P.shape[-1]
            scores_NGT.view(rows, -1, scores_NGT.shape[-1])[..., :prompt].add_(self.mask_R1P)
        return torch.bmm(torch.softmax(scores_NGT, -1), values_NTS).view(rows, -1)

    def select(self, rows_S: Tensor) -> None:
        """Keep these rows, in this order."""
        rows = rows_S.tolist()
        self.lengths = [self.lengths[row] for row in rows]
        filled = slice(self.prompt - max(self.lengths), self.columns)
        for states in (self.keys, self.values):
            for layer, old in enumerate(states):
                states[layer] = old.new_empty(len(rows), *old.shape[1:])
                states[layer][:, :, filled] = old[:, :, filled][rows_S]
        self._lay_out()
