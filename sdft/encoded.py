"""An example with the token ids of its prompts, and batches of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from sdft.batch import Batch, Origin
from sdft.examples import Example
from sdft.prompts import Encoder
from sdft.scorers import Scorer
from sdft.share import deal
from sdft.tasks import Split, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """An example with its encoded prompts.

    Attributes:
        example: The example.
        student_ids: Token ids of the prompt that the student answers.
        teacher_ids: Token ids of the prompt with the demonstration; empty when only evaluated.
        origin: Where a training batch has it from.
        scorer: Its task's.
    """

    example: Example
    student_ids: list[int]
    teacher_ids: list[int]
    origin: Origin = "new"
    scorer: Scorer | None = None


def collate(items: Sequence[Encoded]) -> Batch:
    """A batch of encoded examples."""
    return Batch(
        [item.example for item in items],
        [item.student_ids for item in items],
        [item.teacher_ids for item in items],
        [item.origin for item in items],
    )


def collate_share(items: Sequence[Encoded], rank: int, ranks: int) -> Batch:
    """A process's share of a batch of encoded examples; the batch itself where it is alone."""
    if ranks == 1:
        return collate(items)
    share = deal([item.origin for item in items], rank, ranks)
    batch = collate([items[place] for place in share.places])
    batch.share = share
    return batch


def encode_split(
    encoder: Encoder,
    task: Task,
    split: Split,
    with_teacher: bool,
    student_limit: int,
    teacher_limit: int,
) -> list[Encoded]:
    """Encode a split's examples; those that do not fit are dropped, counted and reported.

    Args:
        encoder: Makes the prompts.
        task: Whose examples.
        split: Which of them.
        with_teacher: Make teacher prompts, too; they need a demonstration.
        student_limit: Longest student prompt, in tokens.
        teacher_limit: Longest teacher prompt, in tokens.

    Raises:
        ValueError: An example that cannot be encoded, or none of them fits.
    """
    encoded = encode_all(encoder, task, split, with_teacher)
    fits_student = [item for item in encoded if len(item.student_ids) <= student_limit]
    fits = [item for item in fits_student if len(item.teacher_ids) <= teacher_limit]
    if len(fits) == len(encoded):
        return fits
    message = (
        f"task {task.name!r}, {split}: dropped {len(encoded) - len(fits)} of "
        f"{len(encoded)} examples ({len(encoded) - len(fits_student)} student prompts over "
        f"{student_limit} tokens, {len(fits_student) - len(fits)} teacher prompts over "
        f"{teacher_limit})"
    )
    if not fits:
        raise ValueError(
            f"{message}: none is left; raise data.max_student_tokens or "
            "data.max_teacher_tokens, lower model.max_new_tokens, or use a model with a "
            "longer context"
        )
    log.warning(message)
    return fits


def encode_all(encoder: Encoder, task: Task, split: Split, with_teacher: bool) -> list[Encoded]:
    """Encode a split's examples, whether they fit or not (see `encode_split`)."""
    return [_encode(encoder, task, e, split, with_teacher) for e in task.examples(split)]


def _encode(
    encoder: Encoder, task: Task, example: Example, split: Split, with_teacher: bool
) -> Encoded:
    try:
        teacher_ids = encoder.teacher_ids(example) if with_teacher else []
        return Encoded(example, encoder.student_ids(example), teacher_ids, scorer=task.scorer)
    except ValueError as error:
        raise ValueError(f"task {task.name!r}, {split}: {error}") from error
