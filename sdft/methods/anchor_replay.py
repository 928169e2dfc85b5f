"""On-policy replay: past prompts are held to what the student was when the stage began."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.batch import Batch, Origin
from sdft.hidden_loss import Grader
from sdft.module import SDFTModule
from sdft.rollout import Rollout
from sdft.weights import set_weights

AnchorKind = Literal["stage_start", "base"]


class AnchorReplayModule(SDFTModule):
    """SDFT that replays past prompts on policy, without their demonstrations.

    New rows are learnt as in SDFT. For `past` rows, which the mixture `sdft.mixtures.PastReplay`
    joins to the batches, the student answers the bare prompt as for every row, and the teacher is
    the anchor: a frozen fp32 copy of the student, which sees the bare prompt too. Where the student
    still is the anchor, replay adds no gradient. `skip_first_tokens` holds for all rows.

    Args:
        anchor: `stage_start`, the student as it was when the stage began and the past tasks had
            been learnt; `base`, the student before the first stage.
        kwargs: See `SDFTModule`.

    Raises:
        ValueError: An unknown anchor, or a number out of range.
    """

    method = "anchor_replay"
    needs_rows: Origin | None = "past"
    copies: tuple[str, ...] = ("teacher", "anchor")
    demonstrated: frozenset[Origin] = frozenset(("new",))

    def __init__(self, anchor: AnchorKind = "stage_start", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if anchor not in get_args(AnchorKind):
            raise ValueError(
                f"anchor must be one of {', '.join(get_args(AnchorKind))}, found {anchor!r}"
            )
        self.anchor_kind: AnchorKind = anchor
        self.anchor: PreTrainedModel | None = None

    def begin_stage(self, stage: int) -> None:
        """Take the anchor."""
        super().begin_stage(stage)
        if self.anchor_kind == "stage_start":
            assert self.anchor is not None
            set_weights(self.anchor, self.model)

    def graders(self, batch: Batch) -> list[Grader]:
        """As in `score`: the anchor for past rows, the teacher for the others."""
        past = [row for row, origin in enumerate(batch.origins) if origin == "past"]
        new = [row for row in range(len(batch)) if row not in set(past)]
        assert self.teacher is not None
        assert self.anchor is not None
        found = [
            Grader(self.anchor, past, batch.rows(past).student_ids),
            Grader(self.teacher, new, batch.rows(new).teacher_ids),
        ]
        return [grader for grader in found if grader.rows]

    @torch.no_grad()
    def score(self, batch: Batch, completion: Rollout) -> Tensor:
        """The anchor's logits of past rows, given the bare prompts; the teacher's of the others."""
        past = [row for row, origin in enumerate(batch.origins) if origin == "past"]
        if not past:
            return super().score(batch, completion)
        new = [row for row in range(len(batch)) if row not in set(past)]
        assert self.anchor is not None
        prompts = batch.rows(past).student_ids
        anchored = self.logits(self.anchor, prompts, completion.rows(past))
        if not new:
            return anchored
        taught = super().score(batch.rows(new), completion.rows(new))
        order = torch.tensor([*past, *new], device=taught.device).argsort()
        return torch.cat([anchored, taught])[order]
