"""What training in several processes needs: shared random numbers, means over all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from sdft.batch import Batch
from sdft.draws import Draws
from sdft.losses import sequence_mean, token_divergence
from sdft.ranks import Scalar, means
from sdft.respondent import Respondent
from sdft.rollout import Rollout
from sdft.run import is_logged
from sdft.seeding import derive_seed, run_seed


class Overseer(Protocol):
    """Whoever watches the steps of training, and may keep one from being made."""

    def see(self, values: Mapping[str, Scalar]) -> None:
        """Take what a batch has logged: means over all processes, by name."""

    def decide(self, optimizer: Optimizer) -> None:
        """Look at the gradients of a whole optimizer step, before they are clipped."""


class SharedSteps(Respondent):
    """A respondent that trains, in one process or in several.

    Attributes:
        overseer: Is told of every step.
        measure_every_n_steps: Optimizer steps between two measurements of what is costly, which
            otherwise follow the logger; 0 for no more than these.
        holds_teacher: The teacher does not move after the optimizer step under way.
    """

    overseer: Overseer | None = None
    measure_every_n_steps = 0
    holds_teacher = False

    @property
    @abstractmethod
    def base(self) -> PreTrainedModel | None:
        """The model as it was before training; None when not tracked."""

    @property
    def logs_this_step(self) -> bool:
        """Whether the step under way reaches the logger or is measured; costly metrics wait."""
        step, every = self.trainer.global_step + 1, self.measure_every_n_steps
        return is_logged(self.trainer, step) or (every > 0 and step % every == 0)

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
        if self.overseer is not None:
            self.overseer.see(found)
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
