"""What training in several processes needs: shared random numbers, means over all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.batch import Batch
from sdft.draws import Draws
from sdft.losses import sequence_mean, token_divergence
from sdft.ranks import Scalar, means
from sdft.respondent import Respondent
from sdft.rollout import Rollout
from sdft.run import is_logged
from sdft.seeding import derive_seed, run_seed


class SharedSteps(Respondent):
    """A respondent that trains, in one process or in several."""

    @property
    @abstractmethod
    def base(self) -> PreTrainedModel | None:
        """The model as it was before training; None when not tracked."""

    @property
    def logs_this_step(self) -> bool:
        """Whether the step under way reaches the logger; costly metrics wait for it."""
        return is_logged(self.trainer, self.trainer.global_step + 1)

    def log_means(
        self, values: Mapping[str, Scalar], count: Tensor | int, **options: Any
    ) -> dict[str, Scalar]:
        """Log means over the things of all processes; a collective call.

        Args:
            values: Named means over this process's things.
            count: How many things: rows, sequences, or tokens.
            options: See `LightningModule.log_dict`.

        Returns:
            What was logged.
        """
        found = means(values, count, torch.empty(0, device=self.device))
        self.log_dict(found, batch_size=max(int(count), 1), **options)
        return found

    def seed_of_batch(self, batch_idx: int, rank: int) -> int:
        """A function of the place in the run, so that a resumed run draws the same."""
        return derive_seed(run_seed(), self.trainer.current_epoch, batch_idx, rank)

    def draws(self, batch: Batch) -> Draws | None:
        """Random numbers for a rollout of the batch, whichever of its rows this process has."""
        if batch.share is None:
            return None
        seed = self.seed_of_batch(self.trainer.fit_loop.batch_idx, rank=0)
        return Draws(batch.share.places, batch.share.total, seed)

    def kl_to_base(
        self,
        prompts: list[list[int]],
        completion: Rollout,
        student_logits_BTV: Tensor,
        mask_BT: Tensor,
    ) -> Tensor:
        """KL(base ‖ student) per token on completions of bare prompts, where the mask is true."""
        assert self.base is not None
        base_logits_BTV = self.logits(self.base, prompts, completion)
        per_token_BT = token_divergence(student_logits_BTV, base_logits_BTV)
        return sequence_mean(per_token_BT, mask_BT)
