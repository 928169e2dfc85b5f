"""SFT: cross-entropy on the demonstrations, the baseline that SDFT is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from sdft.batch import Batch, pad
from sdft.losses import sequence_mean, token_cross_entropy
from sdft.ranks import part_of_mean
from sdft.rollout import Rollout
from sdft.student import StudentModule


class SFTModule(StudentModule):
    """Supervised fine-tuning on the demonstration as the response to the bare prompt.

    The same prompts, batches, schedule and evaluation as SDFT. A method with other targets or
    another loss overrides `targets` or `token_loss`.

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
        logits_BTV = self.logits(self.model, batch.student_ids, target)
        mask_BT = batch.counted(target.mask_BT)
        loss = sequence_mean(self.token_loss(logits_BTV, target.ids_BT), mask_BT)
        self.phases.enter("track")
        self._log_step(batch, target, loss, logits_BTV.detach())
        self.phases.enter("update")  # backward and optimizer follow
        return part_of_mean(loss, mask_BT.any(-1).sum())

    def token_loss(self, logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
        """The loss of each target token, `[B, T]`: its negative log-likelihood."""
        return token_cross_entropy(logits_BTV, target_BT)

    def targets(self, batch: Batch) -> Rollout:
        """The demonstrations as completions, each ended by the end-of-sequence token."""
        sequences = [self._target_ids(example.demonstration or "") for example in batch.examples]
        ids_BT, mask_BT = pad(sequences, self.pad_id, "right", self.device)
        return Rollout(ids_BT, mask_BT, torch.zeros(len(batch), dtype=torch.bool))

    def _target_ids(self, demonstration: str) -> list[int]:
        ids = self.tokenizer.encode(demonstration, add_special_tokens=False)
        eos = self.tokenizer.eos_token_id
        return [*ids, eos] if eos is not None else list(ids)

    def _log_step(self, batch: Batch, target: Rollout, loss: Tensor, logits_BTV: Tensor) -> None:
        values = {
            "train/loss": loss.detach(),
            "train/completion_length": batch.mean(target.lengths_B),
        }
        self.track(values, batch.student_ids, target, logits_BTV, batch.real)
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(batch))
