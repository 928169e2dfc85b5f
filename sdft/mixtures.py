"""What else a stage trains on, beside its own task: replay, general prompts, all tasks at once.

A mixture rewrites a stage's batches and never changes how many there are, so every method makes
the same number of optimizer steps. What it draws is a function of the seed and the stage.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Protocol

from sdft.batch import Origin
from sdft.encoded import Encoded
from sdft.seeding import derive_seed
from sdft.tasks import Split, Task

Batches = list[list[Encoded]]


class Stream(Protocol):
    """What a mixture asks of the task stream."""

    tasks: list[Task]
    general: list[Task]
    batch_size: int

    def encoded(self, task: Task, split: Split) -> list[Encoded]:
        """A split's examples that fit, encoded."""

    def general_prompts(self) -> list[Encoded]:
        """The prompts of the general tasks, without teacher prompts."""

    def own_batches(self, stage: int) -> Batches:
        """The batches of a stage's own task."""


class Mixture(ABC):
    """Rewrites the batches of a stage.

    Attributes:
        label: Its name in reports, behind the method's.
        origin: Where the rows that it adds come from.
    """

    label = "mixture"
    origin: Origin = "new"

    @abstractmethod
    def mix(self, stream: Stream, stage: int, batches: Batches, seed: int) -> Batches:
        """The stage's batches, as many as were given.

        Args:
            stream: The task stream.
            stage: Index of the stage.
            batches: The stage's batches so far.
            seed: The run's seed.
        """

    def segments(self, batches: int) -> list[int]:
        """The stage's batches in parts, each with a learning-rate schedule of its own."""
        return [batches]


class PastReplay(Mixture):
    """Joins examples of earlier tasks to every batch; the first stage has none.

    Each earlier task has the same chance. The new examples stay as they are: replay adds to a
    batch, so it costs what it adds.

    Args:
        ratio: Replayed examples per new one; exact over a stage, fractions are carried over.
        memory: Examples kept of each earlier task, chosen once; all when unset.

    Raises:
        ValueError: A ratio that is not above 0, or a memory below 1.
    """

    label = "replay"
    origin: Origin = "past"

    def __init__(self, ratio: float = 0.25, memory: int | None = None) -> None:
        self.ratio = _checked_ratio(ratio)
        if memory is not None and memory < 1:
            raise ValueError(f"PastReplay: memory must be at least 1, found {memory}")
        self.memory = memory

    def mix(self, stream: Stream, stage: int, batches: Batches, seed: int) -> Batches:
        """Append past examples to each batch."""
        past = [self._kept(stream, task, seed) for task in stream.tasks[:stage]]
        if not past:
            return batches
        rng = random.Random(derive_seed(seed, self.label, stage))
        counts = shares([_new_rows(batch) for batch in batches], self.ratio)
        return [
            [*batch, *(rng.choice(rng.choice(past)) for _ in range(count))]
            for batch, count in zip(batches, counts, strict=True)
        ]

    def _kept(self, stream: Stream, task: Task, seed: int) -> list[Encoded]:
        items = [replace(item, origin=self.origin) for item in stream.encoded(task, "train")]
        if self.memory is None or self.memory >= len(items):
            return items
        return random.Random(derive_seed(seed, self.label, task.name)).sample(items, self.memory)


class GeneralPrompts(Mixture):
    """Joins prompts of `data.general` to every batch, for methods that distil answers to them.

    Args:
        ratio: General prompts per new example; exact over a stage, fractions are carried over.

    Raises:
        ValueError: A ratio that is not above 0.
    """

    label = "general"
    origin: Origin = "general"

    def __init__(self, ratio: float = 0.5) -> None:
        self.ratio = _checked_ratio(ratio)

    def mix(self, stream: Stream, stage: int, batches: Batches, seed: int) -> Batches:
        """Append general prompts to each batch."""
        draw = _PromptDraw(stream.general_prompts(), derive_seed(seed, self.label, stage))
        counts = shares([_new_rows(batch) for batch in batches], self.ratio)
        return [[*batch, *draw.take(count)] for batch, count in zip(batches, counts, strict=True)]


class Reinvoke(Mixture):
    """Gives the last part of every stage to prompts of `data.general` alone.

    With `sdft.methods.ReinvokeModule` this is "SFT + re-invoke" (arXiv 2601.19897): supervised
    steps, then on-policy distillation from the base on general prompts, within one budget of steps.

    Args:
        share: Share of the stage's steps that is given to them, in (0, 1).

    Raises:
        ValueError: A share outside (0, 1).
    """

    label = "reinvoke"
    origin: Origin = "general"

    def __init__(self, share: float = 0.3) -> None:
        if not 0.0 < share < 1.0:
            raise ValueError(f"Reinvoke: share must lie between 0 and 1, found {share}")
        self.share = share

    def mix(self, stream: Stream, stage: int, batches: Batches, seed: int) -> Batches:
        """Replace the last batches by general prompts."""
        draw = _PromptDraw(stream.general_prompts(), derive_seed(seed, self.label, stage))
        kept = self.segments(len(batches))[0]
        return [*batches[:kept], *(draw.take(stream.batch_size) for _ in batches[kept:])]

    def segments(self, batches: int) -> list[int]:
        """The supervised part, then the general one; both have a batch where there are two."""
        general = min(max(1, round(self.share * batches)), batches - 1)
        return [batches - general, general]


class Joint(Mixture):
    """Trains on all tasks at once: the upper bound that sequential learning is measured against.

    The run sees exactly the batches' examples of the sequential run, shuffled over all stages; the
    stages only say when it is evaluated.
    """

    label = "joint"

    def mix(self, stream: Stream, stage: int, batches: Batches, seed: int) -> Batches:
        """This stage's part of the shuffled whole."""
        stages = [stream.own_batches(i) for i in range(len(stream.tasks))]
        items = [item for own in stages for batch in own for item in batch]
        random.Random(derive_seed(seed, self.label)).shuffle(items)
        sizes = [len(batch) for own in stages for batch in own]
        dealt = [items[start:end] for start, end in pairwise(accumulate(sizes, initial=0))]
        first = sum(map(len, stages[:stage]))
        return dealt[first : first + len(batches)]


def stage_parts(mixtures: Sequence[Mixture], batches: int) -> list[int]:
    """A stage's batches in the parts that the mixtures make of them; none is empty."""
    parts = [batches]
    for mixture in mixtures:
        parts = [part for whole in parts for part in mixture.segments(whole)]
    return [part for part in parts if part]


MIXTURES: tuple[type[Mixture], ...] = (PastReplay, GeneralPrompts, Reinvoke, Joint)
"""The mixtures of this module."""


class _PromptDraw:
    """General prompts in passes, each pass shuffled anew, so that none is used much more often."""

    def __init__(self, prompts: Sequence[Encoded], seed: int) -> None:
        self.items = [replace(item, origin="general") for item in prompts]
        self.rng = random.Random(seed)
        self.left: list[Encoded] = []

    def take(self, count: int) -> list[Encoded]:
        taken = []
        for _ in range(count):
            if not self.left:
                self.left = self.rng.sample(self.items, len(self.items))
            taken.append(self.left.pop())
        return taken


def shares(sizes: Sequence[int], ratio: float) -> list[int]:
    """How many rows join each batch, so that their sum is the ratio of the whole, rounded down.

    Args:
        sizes: New rows of each batch.
        ratio: Rows that join per new row.
    """
    totals = [math.floor(total * ratio + 1e-9) for total in accumulate(sizes, initial=0)]
    return [after - before for before, after in pairwise(totals)]


def _new_rows(batch: Sequence[Encoded]) -> int:
    """Rows that no mixture added: ratios count against these, in whatever order mixtures stand."""
    return sum(item.origin == "new" for item in batch)


def _checked_ratio(ratio: float) -> float:
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"a mixture's ratio must be a number above 0, found {ratio}")
    return ratio
