"""Which training examples of a task fit the length limits: all of them, not a sample."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sdft.encoded import Encoded, encode_all
from sdft.prompts import Encoder
from sdft.seeding import derive_seed
from sdft.tasks import Task


@dataclass(frozen=True)
class Fitting:
    """A task's training examples against the limits, counted as `fit` counts them.

    Attributes:
        items: Those that fit.
        total: All there are.
        dropped_student: Dropped because the student's prompt is too long.
        dropped_teacher: Dropped because the teacher's prompt is too long, though the student's
            fits.
        limits: Longest student and teacher prompt, in tokens.
        longest: The longest of all student and of all teacher prompts, in tokens; 0 for none.
    """

    items: list[Encoded]
    total: int
    dropped_student: int
    dropped_teacher: int
    limits: tuple[int, int]
    longest: tuple[int, int]

    @property
    def dropped(self) -> int:
        """How many are left out."""
        return self.dropped_student + self.dropped_teacher

    @property
    def dropped_share(self) -> float:
        """Their share; 0 where there is no example."""
        return self.dropped / self.total if self.total else 0.0

    @classmethod
    def of(cls, encoder: Encoder, task: Task, limits: tuple[int, int]) -> Fitting:
        """Encode all training examples of a task.

        Raises:
            ValueError: An example that cannot be read or encoded.
        """
        encoded = encode_all(encoder, task, "train", with_teacher=True)
        student_fits = [item for item in encoded if len(item.student_ids) <= limits[0]]
        fits = [item for item in student_fits if len(item.teacher_ids) <= limits[1]]
        longest = (
            max((len(item.student_ids) for item in encoded), default=0),
            max((len(item.teacher_ids) for item in encoded), default=0),
        )
        dropped = len(encoded) - len(student_fits), len(student_fits) - len(fits)
        return cls(fits, len(encoded), *dropped, limits, longest)

    def sample(self, name: str, count: int, seed: int) -> list[Encoded]:
        """Some of the examples that fit, the same for the same seed, in their order.

        Args:
            name: The task's.
            count: How many; all where there are not so many.
            seed: Draws them.
        """
        draw = random.Random(derive_seed(seed, "preflight", name))
        chosen = draw.sample(range(len(self.items)), min(count, len(self.items)))
        return [self.items[place] for place in sorted(chosen)]
