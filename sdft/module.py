"""SDFT: the student learns from itself with the demonstration before its eyes.

Each step samples completions from the student without the demonstration, scores them with the EMA
teacher that sees it, and minimises the per-token divergence between the two over the whole
vocabulary (arXiv 2601.19897, algorithm 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.batch import Batch
from sdft.losses import check_alpha, sequence_mean, token_divergence, token_entropy
from sdft.rollout import Rollout, Sampling
from sdft.scoring import completion_logits
from sdft.student import StudentModule
from sdft.weights import frozen_copy


class SDFTModule(StudentModule):
    """On-policy self-distillation from a teacher that sees the demonstration.

    A custom loss overrides `loss`; `rollout` and `score` are as small. The teacher is moved by
    `sdft.callbacks.EMATeacher`, which must be among the trainer's callbacks.

    Args:
        alpha: Divergence: 0 forward KL(teacher ‖ student), 1 reverse KL, between: JSD.
        temperature: Samples rollouts and divides the logits of both sides.
        top_p: Rollouts keep the smallest set of tokens with this probability.
        top_k: Rollouts keep this many likeliest tokens; 0 keeps all.
        skip_first_tokens: Completion tokens left out of the loss, where artifacts of the
            demonstration appear.
        rollouts_per_prompt: Completions sampled per prompt.
        kwargs: See `StudentModule`.

    Raises:
        ValueError: A number out of range.
    """

    method = "sdft"

    def __init__(
        self,
        alpha: float = 0.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        skip_first_tokens: int = 3,
        rollouts_per_prompt: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_alpha(alpha)
        if temperature == 0:
            raise ValueError("temperature must be above 0 in training, found 0")
        if skip_first_tokens < 0:
            raise ValueError(f"skip_first_tokens must be 0 or more, found {skip_first_tokens}")
        if rollouts_per_prompt < 1:
            raise ValueError(f"rollouts_per_prompt must be at least 1, found {rollouts_per_prompt}")
        self.alpha = alpha
        self.sampling = Sampling(self.greedy.max_new_tokens, temperature, top_p, top_k)
        self.skip_first_tokens = skip_first_tokens
        self.rollouts_per_prompt = rollouts_per_prompt
        self.teacher: PreTrainedModel | None = None
        self._restored_teacher: dict[str, Tensor] = {}

    def prepare_copies(self, student: PreTrainedModel) -> None:
        """Copy the base, and the teacher: fp32, frozen, a submodule that checkpoints carry."""
        super().prepare_copies(student)
        if self._fitting:
            self.teacher = frozen_copy(student)

    def on_fit_start(self) -> None:
        """Make sure that something moves the teacher; give a restored one its fp32 values back.

        Raises:
            ValueError: No callback of the trainer does.
        """
        if not any(getattr(c, "moves_teacher", False) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "no callback moves the teacher: add sdft.callbacks.EMATeacher() to the trainer's "
                "callbacks (kind 'frozen' keeps it still)"
            )
        # Between loading and here, the precision `bf16-true` has rounded the whole module.
        if self.teacher is not None and self._restored_teacher:
            self.teacher.float().load_state_dict(self._restored_teacher)
            self._restored_teacher = {}

    # ---------------------------------------------------------------- one step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Rollout, scoring and divergence of one batch of prompts; returns the loss."""
        batch = batch.repeat(self.rollouts_per_prompt)
        self.phases.enter("generate")
        completion = self.rollout(batch)
        self.phases.enter("score")
        teacher_logits_BTV = self.score(batch, completion)
        self.phases.enter("update")
        student_logits_BTV = self.student_logits(batch, completion)
        loss = self.loss(student_logits_BTV, teacher_logits_BTV, self.loss_mask(completion))
        self.phases.enter("track")
        self._log_step(batch, completion, loss, student_logits_BTV.detach())
        self.phases.enter("update")  # backward and optimizer follow
        return loss

    def rollout(self, batch: Batch) -> Rollout:
        """Sample a completion of every student prompt, without the demonstration."""
        return self.engine.generate(
            self.model, batch.student_ids, self.sampling, self.eos_ids, self.pad_id
        )

    @torch.no_grad()
    def score(self, batch: Batch, completion: Rollout) -> Tensor:
        """Teacher logits of the completions, given the prompts with demonstration: `[B, T, V]`."""
        assert self.teacher is not None
        return completion_logits(self.teacher, batch.teacher_ids, completion, self.pad_id)

    def student_logits(self, batch: Batch, completion: Rollout) -> Tensor:
        """Student logits of the completions, given the bare prompts: `[B, T, V]`."""
        return completion_logits(self.model, batch.student_ids, completion, self.pad_id)

    def loss_mask(self, completion: Rollout) -> Tensor:
        """Completion tokens that count in the loss, `[B, T]`: all but the first few."""
        positions_T = torch.arange(completion.mask_BT.shape[1], device=completion.mask_BT.device)
        return completion.mask_BT & (positions_T >= self.skip_first_tokens)

    def loss(
        self, student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, mask_BT: Tensor
    ) -> Tensor:
        """The method's loss: override this for a loss of your own.

        Args:
            student_logits_BTV: Carries the gradient.
            teacher_logits_BTV: Detached.
            mask_BT: True at tokens that count.

        Returns:
            A scalar.
        """
        per_token_BT = token_divergence(
            student_logits_BTV.float() / self.sampling.temperature,
            teacher_logits_BTV.float() / self.sampling.temperature,
            self.alpha,
        )
        return sequence_mean(per_token_BT, mask_BT)

    # ---------------------------------------------------------------- logging

    @torch.no_grad()
    def _log_step(
        self, batch: Batch, completion: Rollout, loss: Tensor, student_logits_BTV: Tensor
    ) -> None:
        values: dict[str, Tensor] = {
            "train/divergence": loss.detach(),
            "train/completion_length": completion.lengths_B.float().mean(),
            "train/truncated": completion.truncated_B.float().mean(),
        }
        if self.logs_this_step:
            entropy_BT = token_entropy(student_logits_BTV)
            values["train/entropy"] = sequence_mean(entropy_BT, completion.mask_BT)
            if self.base is not None:
                values["train/kl_base_student"] = self.kl_to_base(
                    batch, completion, student_logits_BTV
                )
        self.log_dict(values, batch_size=len(batch))
        self.log("divergence", loss.detach(), prog_bar=True, logger=False, batch_size=len(batch))

    def kl_to_base(self, batch: Batch, completion: Rollout, student_logits_BTV: Tensor) -> Tensor:
        """KL(base ‖ student) per token on the student's own completions of the new task."""
        assert self.base is not None
        base_logits_BTV = completion_logits(self.base, batch.student_ids, completion, self.pad_id)
        return sequence_mean(
            token_divergence(student_logits_BTV, base_logits_BTV), completion.mask_BT
        )

    # ---------------------------------------------------------------- checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the teacher as it was saved."""
        super().on_load_checkpoint(checkpoint)
        weights = checkpoint["state_dict"].items()
        self._restored_teacher = {
            key.removeprefix("teacher."): value
            for key, value in weights
            if key.startswith("teacher.")
        }
