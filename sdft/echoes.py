"""Tokens that only echo the demonstration's form, told by a wrong demonstration.

A demonstration shifts the teacher's predictions for two reasons: by what it says, which is to be
learnt, and by being there, which is not ("Based on the example …"). Put another example's
demonstration of the same task in its place, and the second shift stays. With p the teacher's
distribution of a token, p' that of the teacher with the wrong demonstration and q the student's,
the token is an echo where

    KL(p ‖ p') < share · KL(p ‖ q),

that is, where the log-probabilities of what the teacher would say have on average risen above the
student's nearly as much with the wrong demonstration:
E_p[log p' − log q] > (1 − share) · E_p[log p − log q].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sdft.batch import Batch, Origin
from sdft.examples import Example
from sdft.prompts import Encoder
from sdft.seeding import derive_seed, run_seed

if TYPE_CHECKING:
    from sdft.data import ContinualDataModule

TRIES = 16
"""Examples that are asked for a demonstration that differs and fits."""


def check_share(share: float | None) -> None:
    """Raise ValueError unless echoes can be told by this share."""
    if share is not None and not (math.isfinite(share) and 0.0 < share <= 1.0):
        raise ValueError(f"mask_echoes must lie in (0, 1] or be unset, found {share}")


class WrongDemonstrations:
    """Teacher prompts with another example's demonstration, and context, of the same task.

    Which one is a function of the seed and the example's place in its task.

    Args:
        encoder: Makes the prompts.
        tasks: By name, the examples that training batches hold, the same objects.
        limit: Longest prompt, in tokens.
        seed: The run's.

    Raises:
        ValueError: A task whose examples all show the teacher the same.
    """

    def __init__(
        self, encoder: Encoder, tasks: Mapping[str, Sequence[Example]], limit: int, seed: int
    ) -> None:
        self.encoder, self.tasks, self.limit, self.seed = encoder, tasks, limit, seed
        self._places = {
            id(example): (name, place)
            for name, examples in tasks.items()
            for place, example in enumerate(examples)
        }
        self._prompts: dict[int, list[int] | None] = {}
        for name, examples in tasks.items():
            if len({_shown(example) for example in examples}) < 2:
                raise ValueError(
                    f"model.mask_echoes needs two different demonstrations in every task, task "
                    f"{name!r} has one: leave it unset"
                )

    @classmethod
    def of_stream(cls, data: ContinualDataModule, encoder: Encoder) -> WrongDemonstrations:
        """Those of a task stream's training examples, within the limit of its teacher prompts."""
        tasks = {t.name: [i.example for i in data.encoded(t, "train")] for t in data.tasks}
        return cls(encoder, tasks, data.limits[1], run_seed())

    def prompt(self, example: Example) -> list[int] | None:
        """The example's teacher prompt with the wrong demonstration; None where none is found."""
        key = id(example)
        if key not in self._prompts:
            self._prompts[key] = self._found(example)
        return self._prompts[key]

    def _found(self, example: Example) -> list[int] | None:
        if id(example) not in self._places or example.demonstration is None:
            return None
        name, place = self._places[id(example)]
        examples = self.tasks[name]
        for attempt in range(TRIES):
            drawn = derive_seed(self.seed, "wrong demonstration", name, place, attempt)
            other = examples[drawn % len(examples)]
            if _shown(other) == _shown(example):
                continue
            wrong = replace(example, demonstration=other.demonstration, context=other.context)
            ids = self.encoder.teacher_ids(wrong)
            if len(ids) <= self.limit and ids != self.encoder.teacher_ids(example):
                return ids
        return None

    def batch(self, batch: Batch, origins: frozenset[Origin]) -> tuple[Batch, list[bool]]:
        """The batch with wrong demonstrations, and which rows have one; the others are as before.

        Args:
            batch: B rows.
            origins: Rows that the teacher sees with their demonstration.
        """
        wrong = batch.rows(range(len(batch)))
        found = [
            self.prompt(example) if origin in origins else None
            for example, origin in zip(batch.examples, batch.origins, strict=True)
        ]
        for row, prompt in enumerate(found):
            if prompt is not None:
                wrong.teacher_ids[row] = prompt
        return wrong, [prompt is not None for prompt in found]


def _shown(example: Example) -> tuple[str | None, str]:
    return example.demonstration, example.context
