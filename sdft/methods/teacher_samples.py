"""Offline distillation: the student learns what a teacher, shown the demonstration, wrote before.

The same teacher as SDFT's, the base with the demonstration before its eyes, but it writes the
answers itself and once: what on-policy learning is measured against (arXiv 2601.19897, section 5:
70.8 on-policy, 64.7 by offline distillation, 62.2 by SFT on teacher samples).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sdft.batch import Batch, pad
from sdft.checks import AnyCheck
from sdft.encoded import Encoded
from sdft.generated import Request
from sdft.losses import sequence_weights, token_divergence, zero_loss
from sdft.methods.offline import OfflineModule
from sdft.methods.sft import Track
from sdft.ranks import gathered, part_of_mean
from sdft.rollout import Rollout, Sampling
from sdft.run import task_stream
from sdft.states import Lesson, heads_known, taught_by

Loss = Literal["hard", "soft"]


class TeacherSampleModule(OfflineModule):
    """Trains on answers that the base wrote with the demonstration before its eyes.

    Before training the base answers the teacher's prompts of all examples that the run's batches
    hold. A row whose answers the checks all dropped adds nothing to its batch's loss;
    `train/without_sample` is their share.

    Args:
        loss: `hard`: cross-entropy on the samples (distillation at sequence level). `soft`:
            KL(teacher ‖ student) over the whole vocabulary at each of their tokens; the base stays
            in memory for it.
        samples_per_prompt: Answers sampled of each teacher prompt; a row of a batch takes one of
            those kept, drawn anew each time.
        temperature: Samples the answers; with the soft loss it also divides the logits of both
            sides.
        top_p: Answers keep the smallest set of tokens with this probability.
        top_k: Answers keep this many likeliest tokens; 0 keeps all.
        checks: Which answers are kept (`sdft.checks`, or one's own), for example those that the
            task's scorer finds right (`ScoreCheck`); all when unset.
        store: Folder for answers that several runs share; `<run>/generated` when unset.
        kwargs: See `StudentModule`.

    Raises:
        ValueError: A number out of range or an unknown loss.
    """

    method = "teacher_samples"

    def __init__(
        self,
        loss: Loss = "hard",
        samples_per_prompt: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        checks: list[AnyCheck] | None = None,
        store: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(samples_per_prompt, checks, store, **kwargs)
        if loss not in get_args(Loss):
            raise ValueError(f"model.loss must be one of {get_args(Loss)}, found {loss!r}")
        if temperature == 0 and loss == "soft":
            raise ValueError("model.temperature must be above 0 with the soft loss, found 0")
        self.sampling = Sampling(self.greedy.max_new_tokens, temperature, top_p, top_k)
        self.loss_kind = loss

    @property
    def trains_with_base(self) -> bool:
        """The soft loss asks the teacher at every step."""
        return self.loss_kind == "soft"

    def requests(self) -> list[Request]:
        """The teacher's prompts of all examples that the stages train on, each once."""
        data, stages = task_stream(self.trainer), self.trainer.max_epochs or 0
        batches = [batch for stage in range(stages) for batch in data.mixed_batches(stage)]
        items = {_key(item): item for batch in batches for item in batch}
        return [Request(item.example, ids, item.scorer) for ids, item in items.items()]

    # ---------------------------------------------------------------- one step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the samples of the batch's rows."""
        self.phases.enter("update")
        rows, places = self.answered(batch, batch.teacher_ids, batch_idx)
        without = 1 - rows.count / max(batch.count, 1)
        self.log_means({"train/without_sample": without}, batch.count)
        if not any(gathered(len(places))):
            return zero_loss(self.model.parameters())
        completion = self.completions(places)
        if not places:  # other processes may have some, and none passes through the model alone
            rows, completion = self._nothing(batch)
        mask_BT = rows.counted(completion.mask_BT)
        weights_BT, sequences = sequence_weights(mask_BT), mask_BT.any(-1).sum()
        if self.loss_kind == "hard":
            return self.fitted(rows, completion, weights_BT, sequences)
        distil = self._distil_states if self.distils_states else self._distil_logits
        loss, track = distil(rows, completion, weights_BT)
        self.phases.enter("track")
        self._log_step(rows, completion, loss, sequences, track)
        self.phases.enter("update")  # backward and optimizer follow
        return part_of_mean(loss, sequences)

    def _nothing(self, batch: Batch) -> tuple[Batch, Rollout]:
        """A row and a completion of one token that do not count."""
        row = batch.rows([0])
        assert row.share is not None
        row.share = replace(row.share, real=(False,))
        ids_BT, mask_BT = pad([[self.pad_id]], self.pad_id, "right", self.device)
        return row, Rollout(ids_BT, mask_BT, torch.zeros(1, dtype=torch.bool))

    @property
    def distils_states(self) -> bool:
        """Whether the soft loss is taken from hidden states (see `fits_states`)."""
        return self.takes_states and heads_known(self.base)

    def _distil_states(
        self, batch: Batch, completion: Rollout, weights_BT: Tensor
    ) -> tuple[Tensor, Track]:
        assert self.base is not None
        lesson = Lesson(batch.student_ids, self.base, batch.teacher_ids, completion, weights_BT)
        loss, student = taught_by(self, lesson, self.sampling.temperature)
        return loss, self.tracking(batch, completion, student)

    def _distil_logits(
        self, batch: Batch, completion: Rollout, weights_BT: Tensor
    ) -> tuple[Tensor, Track]:
        assert self.base is not None
        self.phases.enter("score")
        with torch.no_grad():
            teacher_BTV = self.logits(self.base, batch.teacher_ids, completion)
        self.phases.enter("update")
        logits_BTV = self.logits(self.model, batch.student_ids, completion)
        temperature = self.sampling.temperature
        per_token_BT = token_divergence(
            logits_BTV.float() / temperature, teacher_BTV.float() / temperature
        )
        loss = (weights_BT * per_token_BT)[completion.mask_BT].sum()
        return loss, self.tracking_logits(batch, completion, logits_BTV)


def _key(item: Encoded) -> tuple[int, ...]:
    return tuple(item.teacher_ids)
