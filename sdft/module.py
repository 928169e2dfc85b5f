"""SDFT: the student learns from itself with the demonstration before its eyes.

Each step samples completions from the student without the demonstration, scores them with the EMA
teacher that sees it, and minimises the per-token divergence between the two over the whole
vocabulary (arXiv 2601.19897, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.batch import Batch
from sdft.head import gathered_head, head
from sdft.head_losses import head_divergence, head_entropy
from sdft.losses import check_alpha, sequence_mean, sequence_weights, token_divergence
from sdft.ranks import part_of_mean
from sdft.rollout import Rollout, Sampling
from sdft.sharding import forwarded
from sdft.student import StudentModule


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
    copies: tuple[str, ...] = ("teacher",)

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

    def on_fit_start(self) -> None:
        """Make sure that something moves the teacher.

        Raises:
            ValueError: No callback of the trainer does.
        """
        super().on_fit_start()
        if not any(getattr(c, "moves_teacher", False) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "no callback moves the teacher: add sdft.callbacks.EMATeacher() to the trainer's "
                "callbacks (kind 'frozen' keeps it still)"
            )

    # ---------------------------------------------------------------- one step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Rollout, scoring and divergence of one batch of prompts; returns the loss."""
        batch = batch.repeat(self.rollouts_per_prompt)
        self.phases.enter("generate")
        completion = self.rollout(batch)
        compare = self._compare_hidden if self.compares_hidden else self._compare_logits
        loss, tracked = compare(batch, completion)
        sequences = self._counting(batch, completion).any(-1).sum()
        self.phases.enter("track")
        self._log_step(batch, completion, loss, sequences, tracked)
        self.phases.enter("update")  # backward and optimizer follow
        return part_of_mean(loss, sequences)

    def _counting(self, batch: Batch, completion: Rollout) -> Tensor:
        """The loss's mask, `[B, T]`, without rows that only keep this process in step."""
        return batch.counted(self.loss_mask(completion))

    @property
    def compares_hidden(self) -> bool:
        """Whether the loss is taken from hidden states, so that whole logits never exist.

        Not where a subclass has logits or a loss of its own, or where a head is of no known form.
        """
        own = all(
            getattr(type(self), name) is getattr(SDFTModule, name)
            for name in ("score", "student_logits", "logits", "loss", "track")
        )
        assert self.teacher is not None
        return own and head(self.model) is not None and head(self.teacher) is not None

    def _compare_logits(
        self, batch: Batch, completion: Rollout
    ) -> tuple[Tensor, Callable[[], None]]:
        """The loss by the overridable `score`, `student_logits` and `loss`, and what to track."""
        self.phases.enter("score")
        teacher_logits_BTV = self.score(batch, completion)
        self.phases.enter("update")
        student_logits_BTV = self.student_logits(batch, completion)
        loss = self.loss(student_logits_BTV, teacher_logits_BTV, self._counting(batch, completion))
        logits_BTV = student_logits_BTV.detach()
        return loss, lambda: self.track({}, batch.student_ids, completion, logits_BTV, batch.real)

    def _compare_hidden(
        self, batch: Batch, completion: Rollout
    ) -> tuple[Tensor, Callable[[], None]]:
        """The same loss from hidden states, and what to track."""
        assert self.teacher is not None
        self.phases.enter("score")
        with torch.no_grad():
            teacher_ND = self.hidden(self.teacher, batch.teacher_ids, completion)
        teacher = gathered_head(self.teacher, teacher_ND.dtype)
        assert teacher is not None
        self.phases.enter("update")

        def compare() -> tuple[Tensor, Tensor]:
            student_ND, student = (
                self.hidden(self.model, batch.student_ids, completion),
                head(self.model),
            )
            assert student is not None
            divergence_N = head_divergence(
                student_ND,
                student,
                teacher_ND,
                teacher,
                alpha=self.alpha,
                temperature=self.sampling.temperature,
                weights_N=sequence_weights(self._counting(batch, completion))[completion.mask_BT],
            )
            return divergence_N.sum(), student_ND.detach()

        loss, hidden_ND = forwarded(self.model, compare)
        return loss, lambda: self._track_hidden(batch, completion, hidden_ND)

    def rollout(self, batch: Batch) -> Rollout:
        """Sample a completion of every student prompt, without the demonstration."""
        return self.sample(self.model, batch.student_ids, self.sampling, self.draws(batch))

    @torch.no_grad()
    def score(self, batch: Batch, completion: Rollout) -> Tensor:
        """Teacher logits of the completions, given the prompts with demonstration: `[B, T, V]`."""
        assert self.teacher is not None
        return self.logits(self.teacher, batch.teacher_ids, completion)

    def student_logits(self, batch: Batch, completion: Rollout) -> Tensor:
        """Student logits of the completions, given the bare prompts: `[B, T, V]`."""
        return self.logits(self.model, batch.student_ids, completion)

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

    def _log_step(
        self,
        batch: Batch,
        completion: Rollout,
        loss: Tensor,
        sequences: Tensor,
        track: Callable[[], None],
    ) -> None:
        self.log_means({"train/divergence": loss.detach()}, sequences)
        values = {
            "train/completion_length": batch.mean(completion.lengths_B),
            "train/truncated": batch.mean(completion.truncated_B),
        }
        self.log_means(values, batch.count)
        self.log("divergence", loss.detach(), prog_bar=True, logger=False, batch_size=len(batch))
        track()

    @torch.no_grad()
    def _track_hidden(self, batch: Batch, completion: Rollout, hidden_ND: Tensor) -> None:
        """`track` from hidden states."""
        if not self.logs_this_step:
            return
        student = gathered_head(self.model, hidden_ND.dtype)
        assert student is not None
        weights_N = sequence_weights(batch.counted(completion.mask_BT))[completion.mask_BT]
        values = {"train/entropy": (weights_N * head_entropy(hidden_ND, student)).sum()}
        if self.base is not None and self.track_base and head(self.base) is not None:
            base_ND = self.hidden(self.base, batch.student_ids, completion)
            base = gathered_head(self.base, base_ND.dtype)
            assert base is not None
            kl_N = head_divergence(hidden_ND, student, base_ND, base, weights_N=weights_N)
            values["train/kl_base_student"] = kl_N.sum()
        self.log_means(values, batch.count)
