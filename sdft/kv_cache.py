"""A key-value cache that is written in place, for forward passes of any Hugging Face decoder.

`DynamicCache` copies all keys and values at every token; `StaticCache` reserves the whole length
and attends to all of it. This one grows by blocks and shows only what is filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_BLOCK = 64  # tokens by which the cache grows


def attention_windows(config: PreTrainedConfig) -> list[int | None] | None:
    """Each layer's sliding window, None where it attends to everything.

    None in place of the list: some layer keeps more than keys and values (recurrent states,
    compressed or shared caches).
    """
    windows: list[int | None] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(int(layer.sliding_window))
        elif type(layer) is DynamicLayer:
            windows.append(None)
        else:
            return None
    return windows or None


class PreallocatedCache(Cache):
    """Keys and values of R rows whose prompts end in the same column.

    Args:
        windows: See `attention_windows`.
        rows: R.
        columns: Tokens of the longest prompt.
    """

    def __init__(self, windows: Sequence[int | None], rows: int, columns: int) -> None:
        self.rooms = [_Layer(window, rows, columns + _BLOCK) for window in windows]
        super().__init__(layers=[*self.rooms])
        self.columns = columns

    def begin_prompts(self, rows_R: Tensor, length: int) -> None:
        """The next forward pass fills these rows with prompts padded on the left to this length."""
        for layer in self.rooms:
            layer.rows_R, layer.first, layer.filled = rows_R, self.columns - length, 0

    def begin_tokens(self, longest: int) -> None:
        """The next forward passes add a token to every row, of which the longest has this many."""
        for layer in self.rooms:
            layer.first += layer.filled - longest
            layer.rows_R, layer.filled = None, longest

    @property
    def shown(self) -> int:
        """Columns that the next token sees, without its own."""
        return self.rooms[0].filled

    def reserve(self) -> None:
        """Make room for one more column."""
        for layer in self.rooms:
            layer.reserve(1)


class _Layer(DynamicLayer):
    """One layer's keys and values `[R, heads, capacity, head size]`.

    `filled` columns from `first` on are shown to the model; of those a sliding window shows the
    last ones.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, window: int | None, rows: int, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = window is not None
        self.window = window
        self.rows, self.capacity = rows, capacity
        self.first = self.filled = 0
        self.rows_R: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._room(key_states), self._room(value_states)
        self.is_initialized = True

    def _room(self, states: Tensor) -> Tensor:
        # Zeros: what is masked must be finite.
        return states.new_zeros(self.rows, states.shape[1], self.capacity, states.shape[3])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new columns; returns what the model attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.first + self.filled
        end = begin + key_states.shape[2]
        rows = slice(None) if self.rows_R is None else self.rows_R
        self.keys[rows, :, begin:end] = key_states
        self.values[rows, :, begin:end] = value_states
        self.filled += key_states.shape[2]
        if self.rows_R is not None:
            return key_states, value_states
        shown = slice(self.first + self._hidden(begin - self.first), end)
        return self.keys[:, :, shown], self.values[:, :, shown]

    def _hidden(self, filled: int) -> int:
        """Columns that have left the sliding window."""
        return 0 if self.window is None else max(filled - self.window + 1, 0)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset of what `update` will return."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        hidden = self._hidden(self.filled)
        return self.filled + new - hidden, hidden

    def get_seq_length(self, *args: Any) -> int:
        return self.filled

    def reserve(self, columns: int) -> None:
        """Make room for this many more columns."""
        if self.first + self.filled + columns <= self.capacity:
            return
        kept, self.capacity = self.capacity, self.capacity + columns + _BLOCK
        keys, values = self.keys, self.values
        self.keys, self.values = self._room(keys), self._room(values)
        self.keys[:, :, :kept], self.values[:, :, :kept] = keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.rows = len(indices)
