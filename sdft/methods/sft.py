"""SFT: cross-entropy on the demonstrations, the baseline that SDFT is measured against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdft.batch import Batch, pad
from sdft.head_losses import head_cross_entropy
from sdft.losses import sequence_weights, token_cross_entropy
from sdft.ranks import part_of_mean
from sdft.rollout import Rollout
from sdft.states import States, as_new, heads_known, keeps, learnt, track_states
from sdft.student import StudentModule

Track = Callable[[dict[str, Tensor]], None]
"""Logs the values that it is given, and now and then costly ones."""


class SFTModule(StudentModule):
    """Supervised fine-tuning on the demonstration as the response to the bare prompt.

    The same prompts, batches, schedule and evaluation as SDFT, and like SDFT's its loss is taken
    from hidden states. A method with other targets overrides `targets`; one with another loss
    `token_loss`, and has whole logits then, unless it writes `state_loss` as well.

    Args:
        kwargs: See `StudentModule`.
    """

    method = "sft"

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the demonstrations."""
        self.phases.enter("update")
        return self.supervised(batch)

    def supervised(self, batch: Batch) -> Tensor:
        """Mean loss of the batch's targets; logged."""
        target = self.targets(batch)
        mask_BT = batch.counted(target.mask_BT)
        return self.fitted(batch, target, sequence_weights(mask_BT), mask_BT.any(-1).sum())

    def fitted(self, batch: Batch, target: Rollout, weights_BT: Tensor, count: Tensor) -> Tensor:
        """This process's part of a mean of the target tokens' losses; logged.

        Args:
            batch: B rows.
            target: Their targets.
            weights_BT: Make the mean of this process's tokens; 0 at padding.
            count: How many things it is the mean of: sequences, or tokens.
        """
        fit = self._fit_states if self.fits_states else self._fit_logits
        loss, track = fit(batch, target, weights_BT)
        self.phases.enter("track")
        self._log_step(batch, target, loss, count, track)
        self.phases.enter("update")  # backward and optimizer follow
        return part_of_mean(loss, count)

    @property
    def fits_states(self) -> bool:
        """Whether the loss is taken from hidden states, so that whole logits never exist.

        Not where a subclass has logits or a loss of its own, or where the head is of no known form.
        """
        return as_new(self, "state_loss", "token_loss") and self.takes_states

    @property
    def takes_states(self) -> bool:
        """Whether hidden states can stand for the student's logits, in losses and in the log."""
        own = keeps(self, StudentModule, "logits", "track", "kl_to_base")
        return own and heads_known(self.model)

    def _fit_states(
        self, batch: Batch, target: Rollout, weights_BT: Tensor
    ) -> tuple[Tensor, Track]:
        targets_N, weights_N = target.ids_BT[target.mask_BT], weights_BT[target.mask_BT]
        loss, student = learnt(
            self,
            batch.student_ids,
            target,
            lambda student: self.state_loss(student, targets_N, weights_N).sum(),
        )
        return loss, self.tracking(batch, target, student)

    def _fit_logits(
        self, batch: Batch, target: Rollout, weights_BT: Tensor
    ) -> tuple[Tensor, Track]:
        logits_BTV = self.logits(self.model, batch.student_ids, target)
        per_token_BT = self.token_loss(logits_BTV, target.ids_BT)
        loss = (weights_BT * per_token_BT)[target.mask_BT].sum()
        return loss, self.tracking_logits(batch, target, logits_BTV)

    def token_loss(self, logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
        """The loss of each target token, `[B, T]`: its negative log-likelihood."""
        return token_cross_entropy(logits_BTV, target_BT)

    def state_loss(self, student: States, targets_N: Tensor, weights_N: Tensor) -> Tensor:
        """`token_loss` from hidden states, times the tokens' weights: `[N]`."""
        return head_cross_entropy(*student, targets_N, weights_N=weights_N)

    def tracking(self, batch: Batch, target: Rollout, student: States) -> Track:
        """What logs a step whose loss came from these hidden states, without their graph."""
        prompts, real = batch.student_ids, batch.real
        return lambda values: track_states(self, values, prompts, target, student, real)

    def tracking_logits(self, batch: Batch, target: Rollout, logits_BTV: Tensor) -> Track:
        """What logs a step whose loss came from whole logits."""
        prompts, real, detached_BTV = batch.student_ids, batch.real, logits_BTV.detach()
        return lambda values: self.track(values, prompts, target, detached_BTV, real)

    def targets(self, batch: Batch) -> Rollout:
        """The demonstrations as completions, each ended by the end-of-sequence token."""
        sequences = [self._target_ids(example.demonstration or "") for example in batch.examples]
        ids_BT, mask_BT = pad(sequences, self.pad_id, "right", self.device)
        return Rollout(ids_BT, mask_BT, torch.zeros(len(batch), dtype=torch.bool))

    def _target_ids(self, demonstration: str) -> list[int]:
        ids = self.tokenizer.encode(demonstration, add_special_tokens=False)
        eos = self.tokenizer.eos_token_id
        return [*ids, eos] if eos is not None else list(ids)

    def _log_step(
        self, batch: Batch, target: Rollout, loss: Tensor, count: Tensor, track: Track
    ) -> None:
        shown = self.log_means({"train/loss": loss.detach()}, count)["train/loss"]
        track({"train/completion_length": batch.mean(target.lengths_B)})
        self.log("loss", shown, prog_bar=True, logger=False, batch_size=len(batch))
