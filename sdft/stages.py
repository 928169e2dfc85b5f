"""The order of training batches within one stage: a pure function of seed and stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate as running_total
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch

from sdft.seeding import derive_seed

ItemT = TypeVar("ItemT")
BatchT = TypeVar("BatchT")


def stage_batches(
    rows: int, batch_size: int, seed: int, stage: int, batches: int, shuffle: bool = True
) -> list[list[int]]:
    """Row indices of each batch of a stage.

    Each pass over the rows is shuffled anew; a pass's last batch may be smaller; passes repeat
    until there are enough batches.

    Args:
        rows: Number of examples, at least 1.
        batch_size: Examples per batch.
        seed: The run's seed.
        stage: Index of the stage.
        batches: How many batches to produce.
        shuffle: Keep the given order when false.
    """
    assert rows > 0
    generator = torch.Generator()
    result: list[list[int]] = []
    epoch = 0
    while len(result) < batches:
        generator.manual_seed(derive_seed(seed, stage, epoch))
        order = torch.randperm(rows, generator=generator).tolist() if shuffle else range(rows)
        result += [list(order[i : i + batch_size]) for i in range(0, rows, batch_size)]
        epoch += 1
    return result[:batches]


def batches_in_stage(
    rows: int, batch_size: int, steps: int | None, epochs: int | None, accumulate: int
) -> int:
    """Batches that make `steps` optimizer steps of `accumulate` batches, or `epochs` passes."""
    if steps is not None:
        return steps * accumulate
    assert epochs is not None
    return epochs * math.ceil(rows / batch_size)


def steps_of_parts(parts: Sequence[int], accumulate: int) -> list[int]:
    """Optimizer steps of each part of a stage; a step that spans two parts is the first one's.

    Args:
        parts: Batches of each part.
        accumulate: Batches per optimizer step; the stage's last step takes what is left.
    """
    ends = [math.ceil(batches / accumulate) for batches in running_total(parts, initial=0)]
    return [end - start for start, end in pairwise(ends)]


class StageLoader(Generic[ItemT, BatchT]):
    """Yields a stage's batches and can continue in its middle.

    Args:
        batches: The items of each batch.
        collate: Makes a batch of its items.
        stage: Index of the stage; a state saved in another stage is ignored.
    """

    def __init__(
        self,
        batches: Sequence[Sequence[ItemT]],
        collate: Callable[[Sequence[ItemT]], BatchT],
        stage: int,
    ) -> None:
        self.batches = batches
        self.collate = collate
        self.stage = stage
        self._start = 0
        self._yielded = 0
        self._ended = False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[BatchT]:
        for index in range(self._start, len(self.batches)):
            if self._ended:
                break
            self._yielded = index + 1
            yield self.collate(self.batches[index])
        self._start = 0

    def coming(self, start: int, end: int) -> list[BatchT]:
        """The batches from `start` to below `end`, where there are any; none is handed out."""
        return [self.collate(items) for items in self.batches[start:end]]

    def end(self) -> None:
        """Hand out no further batch: the stage ends early."""
        self._ended = True

    @property
    def ended(self) -> bool:
        """Whether the stage ends before its last batch."""
        return self._ended

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: its stage, the batches handed out and how many there are."""
        return {
            "stage": self.stage,
            "yielded": self._yielded,
            "ended": self._ended,
            "batches": len(self.batches),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that were handed out, if the state is this stage's.

        Raises:
            ValueError: The stage had more batches, and this many are already done.
        """
        same = state["stage"] == self.stage
        done, before = state["yielded"] if same else 0, state.get("batches", len(self.batches))
        ended = same and bool(state.get("ended", False))
        if done >= len(self.batches) and done < before and not ended:
            raise ValueError(
                f"the checkpoint stands after batch {done} of stage {self.stage + 1}, which had "
                f"{before} and now has {len(self.batches)}: give it more than {done} (data.steps, "
                "data.epochs), or go on from the end of an earlier stage"
            )
        self._start = self._yielded = done
        self._ended = ended
