"""Whether the teacher's prompt is the student's with the demonstration in it, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sdft.encoded import Encoded
from sdft.preflight.misalignments import CHECKS, Problem
from sdft.preflight.tokens import Block, Token, side_by_side, tokens_dict, tokens_of
from sdft.preflight.views import Views
from sdft.prompts import PromptEncoder


@dataclass(frozen=True)
class Alignment:
    """What the checks found, and one example to look at.

    Attributes:
        problems: Of all examples.
        student: Tokens of the shown example's student prompt.
        teacher: Tokens of its teacher prompt.
    """

    problems: list[Problem] = field(default_factory=list)
    student: list[Token] = field(default_factory=list)
    teacher: list[Token] = field(default_factory=list)

    @property
    def blocks(self) -> list[Block]:
        """The shown example's prompts side by side."""
        return side_by_side(self.student, self.teacher)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "problems": [problem.to_dict() for problem in self.problems],
            "student_tokens": tokens_dict(self.student),
            "teacher_tokens": tokens_dict(self.teacher),
        }


def align(
    encoder: PromptEncoder, items: Sequence[Encoded], ends: Sequence[int], vocabulary: int
) -> Alignment:
    """Check the prompts of all examples; show one of middling length.

    Args:
        encoder: Made the prompts.
        items: At least one example, with teacher prompts.
        ends: Token ids that end an answer.
        vocabulary: How many token ids the model knows.
    """
    found: dict[str, Problem] = {}
    counts: Counter[str] = Counter()
    for item in items:
        own = {p.name: p for p in problems_of(Views.of(encoder, item), set(ends), vocabulary)}
        counts.update(own.keys())
        found = {**own, **found}
    problems = [
        Problem(**{**asdict(problem), "count": counts[name], "of": len(items)})
        for name, problem in found.items()
    ]
    shown = sorted(items, key=lambda item: len(item.teacher_ids))[(len(items) - 1) // 2]
    student, teacher = (
        tokens_of(encoder.tokenizer, ids) for ids in (shown.student_ids, shown.teacher_ids)
    )
    return Alignment(problems, student, teacher)


def problems_of(views: Views, ends: set[int], vocabulary: int) -> Iterator[Problem]:
    """What is wrong with the prompts of one example."""
    for check in CHECKS:
        yield from check(views, ends, vocabulary)
