"""A batch of encoded examples, and padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sdft.examples import Example
from sdft.share import Share

Origin = Literal["new", "past", "general"]
"""Where a row comes from: the stage's own task, an earlier one, or general prompts."""


class Batch:
    """Examples with the token ids of their prompts, unpadded.

    A plain class on purpose: Lightning's device transfer leaves it alone, and padding belongs to
    whoever runs the model.

    Attributes:
        examples: B examples.
        student_ids: B student prompts.
        teacher_ids: B teacher prompts; an empty one where nothing needs it.
        origins: B origins; all "new" unless a mixture joined others to the batch.
        share: Where the rows stand in the whole batch, when processes have dealt it among
            themselves; None where this is all of it.
        kept: Whether a filter has let each row through; None where there is none.
    """

    __slots__ = ("examples", "kept", "origins", "share", "student_ids", "teacher_ids")

    def __init__(
        self,
        examples: Sequence[Example],
        student_ids: Sequence[Sequence[int]],
        teacher_ids: Sequence[Sequence[int]] = (),
        origins: Sequence[Origin] | None = None,
        share: Share | None = None,
        kept: Sequence[bool] | None = None,
    ) -> None:
        self.examples = list(examples)
        self.student_ids = [list(ids) for ids in student_ids]
        self.teacher_ids = [list(ids) for ids in teacher_ids]
        self.origins: list[Origin] = ["new"] * len(self.examples) if origins is None else [*origins]
        self.share = share
        self.kept: list[bool] | None = None if kept is None else list(kept)

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, rows: Sequence[int]) -> Batch:
        """The batch of these rows, in this order; a row may be asked for several times."""
        return Batch(
            [self.examples[row] for row in rows],
            [self.student_ids[row] for row in rows],
            [self.teacher_ids[row] for row in rows] if self.teacher_ids else (),
            [self.origins[row] for row in rows],
            self.share and self.share.rows(rows),
            self.kept and [self.kept[row] for row in rows],
        )

    def keeping(self, kept: Sequence[bool]) -> Batch:
        """The same rows, of which only these count."""
        batch = self.rows(range(len(self)))
        batch.kept = list(kept)
        return batch

    def repeat(self, times: int) -> Batch:
        """Every example `times` times, neighbours together."""
        repeated = self.rows([row for row in range(len(self)) for _ in range(times)])
        repeated.share = self.share and self.share.repeat(times)
        return repeated

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """The rows of several batches, one after another."""
        assert all(batch.kept is None for batch in batches), "filters come after"
        shares = [batch.share for batch in batches if batch.share is not None]
        assert len(shares) in (0, len(batches)), "all of them dealt, or none"
        return cls(
            [example for batch in batches for example in batch.examples],
            [ids for batch in batches for ids in batch.student_ids],
            [ids for batch in batches for ids in batch.teacher_ids],
            [origin for batch in batches for origin in batch.origins],
            Share.joined(shares) if shares else None,
        )

    def of(self, *origins: Origin) -> Batch:
        """The rows of these origins, in their order; may be empty."""
        chosen = self.rows([row for row, origin in enumerate(self.origins) if origin in origins])
        chosen.share = self.share and self.share.of(origins)
        return chosen

    @property
    def real(self) -> list[bool]:
        """Whether each row counts: is no stand-in (see `Share`), and was not dropped."""
        real = [True] * len(self) if self.share is None else list(self.share.real)
        return (
            real if self.kept is None else [a and b for a, b in zip(real, self.kept, strict=True)]
        )

    @property
    def count(self) -> int:
        """Rows that count."""
        return sum(self.real)

    def mean(self, values_B: Tensor) -> Tensor:
        """The mean over the rows that count; NaN where none does."""
        chosen_B = values_B if all(self.real) else values_B[torch.tensor(self.real)]
        return chosen_B.float().mean()

    @property
    def total(self) -> int:
        """Rows of the whole batch."""
        return len(self) if self.share is None else self.share.total

    def counted(self, mask_BT: Tensor) -> Tensor:
        """A mask of the rows' tokens, without those of rows that do not count."""
        return counted(mask_BT, self.real)


def counted(mask_BT: Tensor, real: Sequence[bool] | None) -> Tensor:
    """A mask of rows' tokens without the rows that do not count; all do when None."""
    if real is None or all(real):
        return mask_BT
    return mask_BT & torch.tensor(real, device=mask_BT.device)[:, None]


def pad(
    sequences: Sequence[Sequence[int]], pad_id: int, side: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pad token ids to one length.

    Args:
        sequences: B sequences of token ids.
        pad_id: Fills the empty places; any id does, the mask hides it.
        side: "left" or "right".
        device: Where the result lives.

    Returns:
        Ids `[B, T]` and their mask `[B, T]`, true at real tokens.
    """
    assert side in ("left", "right"), side
    length = max((len(sequence) for sequence in sequences), default=0)
    ids_BT = torch.full((len(sequences), length), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(sequences), length), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), None) if side == "left" else slice(len(sequence))
        ids_BT[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask_BT[row, place] = True
    return ids_BT.to(device), mask_BT.to(device)
