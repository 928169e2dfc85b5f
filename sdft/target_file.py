"""Soft targets in a file: of every token of stored answers, the likeliest tokens and the tail.

The file is safetensors: the answers' tokens laid end to end, read a few rows at a time, so that
training needs neither the model that made them nor the whole file in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdft.topk import TopK

SOFT_TARGETS = "soft_targets.safetensors"


def write_soft_targets(path: Path, targets: Sequence[TopK | None]) -> None:
    """Write the targets of A answers.

    The file holds `ids` (int32, `[N, K]`), `log_probs` (fp32, `[N, K]`), `tail` (fp32, `[N]`) and
    `offsets` (int64, `[A + 1]`): the answer `a` has the rows from `offsets[a]` to `offsets[a + 1]`.

    Args:
        path: The file.
        targets: Of each answer, over its T tokens, `[T, K]`; None for an answer without.
    """
    lengths = [0 if target is None else len(target.ids) for target in targets]
    present = [target for target in targets if target is not None]
    tensors = {
        "ids": torch.cat([target.ids for target in present]).to(torch.int32),
        "log_probs": torch.cat([target.log_probs for target in present]).float(),
        "tail": torch.cat([target.tail for target in present]).float(),
        "offsets": torch.tensor(list(accumulate(lengths, initial=0))),
    }
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


class SoftTargets:
    """Reads the targets of chosen answers.

    Args:
        path: What `write_soft_targets` wrote.
    """

    def __init__(self, path: Path) -> None:
        self._file = cast(Any, safe_open)(path, framework="pt")
        self.offsets: list[int] = self._file.get_tensor("offsets").tolist()

    def answer(self, place: int) -> TopK:
        """The targets of one answer, `[T, K]`."""
        rows = slice(self.offsets[place], self.offsets[place + 1])
        ids, log_probs, tail = (
            self._file.get_slice(name)[rows] for name in ("ids", "log_probs", "tail")
        )
        return TopK(ids, log_probs, tail)

    def rows(self, places: Sequence[int], device: torch.device) -> TopK:
        """The targets of these answers' tokens laid end to end, `[N, K]`."""
        parts = zip(*(self.answer(place) for place in places), strict=True)
        return TopK(*(torch.cat(part).to(device) for part in parts))

    def batch(self, places: Sequence[int], device: torch.device) -> TopK:
        """The targets of B answers, `[B, T, K]`; padding has no mass and contributes nothing."""
        answers = [self.answer(place) for place in places]
        return TopK(
            _stack([answer.ids for answer in answers], 0.0).to(device),
            _stack([answer.log_probs for answer in answers], -math.inf).to(device),
            _stack([answer.tail for answer in answers], -math.inf).to(device),
        )

    def __iter__(self) -> Iterator[TopK]:
        return map(self.answer, range(len(self.offsets) - 1))


def _stack(tensors: list[Tensor], padding: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)
