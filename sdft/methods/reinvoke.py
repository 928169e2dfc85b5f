"""SFT + re-invoke: supervised steps, then on-policy distillation from the base."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdft.batch import Batch, Origin
from sdft.losses import check_alpha, sequence_mean, sequence_weights, token_divergence
from sdft.methods.sft import SFTModule
from sdft.ranks import part_of_mean
from sdft.rollout import Rollout, Sampling
from sdft.states import Lesson, heads_known, keeps, taught_by


class ReinvokeModule(SFTModule):
    """Supervised fine-tuning that re-invokes what the base could do (arXiv 2601.19897, baselines).

    Rows of the stage's own task and of earlier ones are learnt as in SFT. For general prompts the
    student samples an answer itself and takes the base's distribution over the whole vocabulary as
    its target, token by token; the base sees the same bare prompt and never moves. With the mixture
    `sdft.mixtures.Reinvoke` the last part of every stage is general prompts alone, with a
    learning-rate schedule of its own; with `GeneralPrompts` they join every batch.

    Args:
        alpha: Divergence from the base: 0 forward KL(base ‖ student), 1 reverse KL, between: JSD.
        temperature: Samples the answers and divides the logits of both sides.
        skip_first_tokens: Answer tokens left out of the divergence.
        kwargs: See `StudentModule`.

    Raises:
        ValueError: A number out of range.
    """

    method = "reinvoke"
    needs_rows: Origin | None = "general"
    learns_from: frozenset[Origin] = frozenset(("new", "past", "general"))
    needs_base = True

    def __init__(
        self,
        alpha: float = 0.0,
        temperature: float = 1.0,
        skip_first_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_alpha(alpha)
        if temperature == 0:
            raise ValueError("temperature must be above 0 in training, found 0")
        if skip_first_tokens < 0:
            raise ValueError(f"skip_first_tokens must be 0 or more, found {skip_first_tokens}")
        self.alpha = alpha
        self.sampling = Sampling(self.greedy.max_new_tokens, temperature)
        self.skip_first_tokens = skip_first_tokens

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean over all rows: the demonstrations' loss, and the general prompts' divergence."""
        supervised, general = batch.of("new", "past"), batch.of("general")
        losses = []
        if len(supervised):
            losses.append(supervised.total * super().training_step(supervised, batch_idx))
        if len(general):
            losses.append(general.total * self.reinvoke(general))
        return torch.stack(losses).sum() / batch.total

    def reinvoke(self, batch: Batch) -> Tensor:
        """Mean divergence from the base on the student's own answers to bare prompts; logged."""
        assert self.base is not None
        self.phases.enter("generate")
        completion = self.sample(self.model, batch.student_ids, self.sampling, self.draws(batch))
        distil = self._distil_states if self.distils_states else self._distil_logits
        loss = distil(batch, completion)
        sequences = self._counting(batch, completion).any(-1).sum()
        self.phases.enter("track")
        self._log_answers(batch, completion, loss.detach(), sequences)
        self.phases.enter("update")  # backward and optimizer follow
        return part_of_mean(loss, sequences)

    def _counting(self, batch: Batch, completion: Rollout) -> Tensor:
        positions_T = torch.arange(completion.mask_BT.shape[1], device=completion.mask_BT.device)
        return batch.counted(completion.mask_BT & (positions_T >= self.skip_first_tokens))

    @property
    def distils_states(self) -> bool:
        """Whether the divergence is taken from hidden states, so that whole logits never exist.

        Not where a subclass has logits or a `divergence` of its own, or where a head is of no
        known form.
        """
        own = keeps(self, ReinvokeModule, "divergence")
        return own and self.takes_states and heads_known(self.base)

    def _distil_states(self, batch: Batch, completion: Rollout) -> Tensor:
        assert self.base is not None
        weights_BT = sequence_weights(self._counting(batch, completion))
        prompts = batch.student_ids
        lesson = Lesson(prompts, self.base, prompts, completion, weights_BT)
        return taught_by(self, lesson, self.sampling.temperature, self.alpha)[0]

    def _distil_logits(self, batch: Batch, completion: Rollout) -> Tensor:
        assert self.base is not None
        self.phases.enter("score")
        with torch.no_grad():
            base_BTV = self.logits(self.base, batch.student_ids, completion)
        self.phases.enter("update")
        student_BTV = self.logits(self.model, batch.student_ids, completion)
        counted = replace(completion, mask_BT=batch.counted(completion.mask_BT))
        return self.divergence(student_BTV, base_BTV, counted)

    def divergence(
        self, student_logits_BTV: Tensor, base_logits_BTV: Tensor, completion: Rollout
    ) -> Tensor:
        """Mean per-token divergence between base and student, after the first few tokens."""
        per_token_BT = token_divergence(
            student_logits_BTV.float() / self.sampling.temperature,
            base_logits_BTV.float() / self.sampling.temperature,
            self.alpha,
        )
        skip = self.skip_first_tokens
        return sequence_mean(per_token_BT[:, skip:], completion.mask_BT[:, skip:])

    def _log_answers(
        self, batch: Batch, completion: Rollout, loss: Tensor, sequences: Tensor
    ) -> None:
        found = self.log_means({"reinvoke/divergence": loss}, sequences)
        values = {
            "reinvoke/completion_length": batch.mean(completion.lengths_B),
            "reinvoke/truncated": batch.mean(completion.truncated_B),
        }
        self.log_means(values, batch.count)
        shown = found["reinvoke/divergence"]
        self.log("divergence", shown, prog_bar=True, logger=False, batch_size=len(batch))
