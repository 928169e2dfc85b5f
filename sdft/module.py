"""SDFT: the student learns from itself with the demonstration before its eyes.

Each step samples completions from the student without the demonstration, scores them with the EMA
teacher that sees it, and minimises the per-token divergence between the two over the whole
vocabulary (arXiv 2601.19897, algorithm 1).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.batch import Batch, Origin
from sdft.buckets import check_top_k
from sdft.echoes import WrongDemonstrations, check_share
from sdft.head import gathered_head
from sdft.hidden_loss import Grader, HiddenLoss, hidden_in_parts
from sdft.horizon import Horizon, as_horizon
from sdft.importance import check_cap, head_log_probs, token_log_probs
from sdft.logits_loss import LogitsLoss
from sdft.losses import (
    bucket_divergence,
    check_alpha,
    sequence_mean,
    token_divergence,
)
from sdft.packing import unpack
from sdft.ranks import gathered, part_of_mean, ranks
from sdft.repetition import repetition
from sdft.rollout import Rollout, Sampling, evaluation_mode
from sdft.rollout_filter import RolloutFilter
from sdft.run import task_stream
from sdft.states import as_new, heads_known, keeps
from sdft.step_options import check_step, check_step_options
from sdft.student import StudentModule
from sdft.window import Draw, Stale, Window, check_window, look_ahead, of_all_ranks, on_device


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
        mask_echoes: Leave out tokens that only echo the demonstration: where the teacher differs
            from a teacher with another example's demonstration by less than this share of its
            divergence from the student. Takes one more pass of the teacher; none when unset.
        rollouts_per_prompt: Completions sampled per prompt.
        updates_per_generation: Optimizer steps whose rollouts are drawn at once, when the first of
            them begins; 1 draws each batch's when its turn comes, strictly on-policy.
        stale: What becomes of rollouts that an older student drew: `correct` weights their tokens
            by how much likelier the student would draw them now; `ignore` takes them as they are;
            `recompute` draws them anew, so that no more than one step is drawn at once.
        importance_cap: Largest of these weights, which an engine with log-probabilities of its own
            has its rollouts weighted by, too.
        horizon: Longest rollout in training, in tokens: a number, or a ramp over the steps of each
            stage (`start`, `end`, `steps`); `max_new_tokens` when unset. Evaluation is not cut.
        micro_batch_tokens: Divide a batch's scoring and update into passes of at most so many
            tokens of prompts and completions, with the same gradient and less memory; a row with
            more stands alone. One pass when unset.
        divergence_top_k: Compare this many tokens one by one and all others as one, a lower bound
            of the exact divergence; the whole vocabulary when unset.
        kwargs: See `StudentModule`.

    Raises:
        ValueError: A number out of range.
    """

    method = "sdft"
    masks_thoughts = True
    copies: tuple[str, ...] = ("teacher",)
    rollout_filter: RolloutFilter | None = None
    """Says which completions are learnt from; all when None."""
    demonstrated: frozenset[Origin] = frozenset(("new", "past"))
    """Rows of a batch that the teacher sees with their demonstration."""

    def __init__(
        self,
        alpha: float = 0.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        skip_first_tokens: int = 3,
        rollouts_per_prompt: int = 1,
        updates_per_generation: int = 1,
        stale: Stale = "correct",
        importance_cap: float = 2.0,
        horizon: int | Horizon | None = None,
        micro_batch_tokens: int | None = None,
        divergence_top_k: int | None = None,
        mask_echoes: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_alpha(alpha)
        check_step_options(temperature, skip_first_tokens, rollouts_per_prompt, micro_batch_tokens)
        check_window(updates_per_generation, stale)
        check_cap(importance_cap)
        check_top_k(divergence_top_k)
        check_share(mask_echoes)
        self.alpha = alpha
        self.sampling = Sampling(self.greedy.max_new_tokens, temperature, top_p, top_k)
        self.skip_first_tokens = skip_first_tokens
        self.rollouts_per_prompt = rollouts_per_prompt
        self.updates_per_generation = updates_per_generation
        self.stale: Stale = stale
        self.importance_cap = importance_cap
        self.horizon = as_horizon(horizon, self.greedy.max_new_tokens)
        self.micro_batch_tokens = micro_batch_tokens
        self.divergence_top_k = divergence_top_k
        self.mask_echoes = mask_echoes
        self.window = Window()
        self.teacher: PreTrainedModel | None = None

    def on_fit_start(self) -> None:
        """Make sure that something moves the teacher, and that the step can be what is asked for.

        Raises:
            ValueError: No callback of the trainer does, or an option does not fit the loss or the
                trainer's strategy.
        """
        super().on_fit_start()
        check_step(self)
        if self.mask_echoes is not None:
            self.wrong  # noqa: B018 - refuses a task that has no wrong demonstrations

    # ---------------------------------------------------------------- one step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Rollout, scoring and divergence of one batch of prompts; returns the loss."""
        batch = batch.repeat(self.rollouts_per_prompt)
        self.phases.enter("generate")
        draw = self._draw(batch, batch_idx)
        way = HiddenLoss if self.compares_hidden else LogitsLoss
        compared = way(self, self._filtered(batch, draw.completion), draw.completion)
        self.phases.enter("score")
        compared.score()
        self.phases.enter("update")
        loss = compared.loss()
        self.phases.enter("track")
        self._log_step(batch, draw, loss.detach(), compared)
        self.phases.enter("update")  # backward and optimizer follow
        return part_of_mean(loss, compared.sequences)

    def _draw(self, batch: Batch, batch_idx: int) -> Draw:
        """The batch's completions, drawn now or ahead."""
        if self.updates_per_generation == 1:
            return Draw(self.rollout(batch), self.global_step, self.drawing.max_new_tokens)
        place = (self.current_epoch, batch_idx, batch)
        draw = self.window.take(*place)
        missing = draw is None or (self.stale == "recompute" and draw.version != self.global_step)
        if any(gathered(missing)):  # all processes draw together
            look_ahead(self, batch_idx)
            draw = self.window.take(*place)
        assert draw is not None, "the task stream hands out the batches that it shows ahead"
        return on_device(draw, self.device)

    def _filtered(self, batch: Batch, completion: Rollout) -> Batch:
        """The batch, where only the rows count that the filter lets through."""
        if self.rollout_filter is None:
            return batch
        kept = self.rollout_filter(batch, completion)
        dropped_B = torch.tensor([not one for one in kept], dtype=torch.float32)
        self.log_means({"train/dropped": batch.mean(dropped_B)}, batch.count)
        return batch.keeping(kept)

    @property
    def compares_hidden(self) -> bool:
        """Whether the loss is taken from hidden states, so that whole logits never exist.

        Not where a subclass has logits or a loss of its own, or where a head is of no known form.
        """
        names = ("student_logits", "logits", "loss", "divergence", "track")
        own = keeps(self, SDFTModule, *names) and as_new(self, "graders", "score")
        return own and heads_known(self.model, *(getattr(self, name) for name in self.copies))

    @property
    def has_own_loss(self) -> bool:
        """Whether a subclass compares in another way than token by token."""
        return type(self).loss is not SDFTModule.loss

    @property
    def drawing(self) -> Sampling:
        """How the step under way draws its rollouts: as `sampling` says, up to the horizon."""
        if self.horizon is None:
            return self.sampling
        made = 0
        if self._trainer is not None:
            made = self.trainer.fit_loop.batch_idx // self.trainer.accumulate_grad_batches
        return replace(self.sampling, max_new_tokens=self.horizon.at(made))

    def rollout(self, batch: Batch) -> Rollout:
        """Sample a completion of every student prompt, without the demonstration."""
        return self.sample(self.model, batch.student_ids, self.drawing, self.draws(batch))

    @torch.no_grad()
    def log_probs(self, batch: Batch, completion: Rollout) -> Tensor:
        """Log-probabilities of the completions' tokens, as the student draws now: `[B, T]`, fp32.

        0 at padding.
        """
        mask_BT = completion.mask_BT
        ids_N = completion.ids_BT[mask_BT]
        with evaluation_mode(self.model):
            if self.compares_hidden:
                hidden_ND = hidden_in_parts(self, self.model, batch.student_ids, completion)
                own = gathered_head(self.model, hidden_ND.dtype)
                assert own is not None
                return unpack(head_log_probs(hidden_ND, own, ids_N, self.sampling), mask_BT)
            logits_NV = self.student_logits(batch, completion)[mask_BT]
        return unpack(token_log_probs(logits_NV, ids_N, self.sampling), mask_BT)

    @torch.no_grad()
    def score(self, batch: Batch, completion: Rollout) -> Tensor:
        """Teacher logits of the completions, given the prompts with demonstration: `[B, T, V]`."""
        assert self.teacher is not None
        return self.logits(self.teacher, batch.teacher_ids, completion)

    def graders(self, batch: Batch) -> list[Grader]:
        """Who scores which rows, where the loss is taken from hidden states: what `score` does."""
        assert self.teacher is not None
        return [Grader(self.teacher, list(range(len(batch))), batch.teacher_ids)]

    @cached_property
    def wrong(self) -> WrongDemonstrations:
        """Teacher prompts with other examples' demonstrations, for `mask_echoes`."""
        return WrongDemonstrations.of_stream(task_stream(self.trainer), self.encoder)

    def wrong_demonstrations(self, batch: Batch) -> tuple[Batch, list[bool]]:
        """The batch with wrong demonstrations for the teacher, and which rows have one."""
        return self.wrong.batch(batch, self.demonstrated)

    def student_logits(self, batch: Batch, completion: Rollout) -> Tensor:
        """Student logits of the completions, given the bare prompts: `[B, T, V]`."""
        return self.logits(self.model, batch.student_ids, completion)

    def loss_mask(self, completion: Rollout) -> Tensor:
        """Completion tokens that count in the loss, `[B, T]`: all but the first few.

        Without the thoughts where `thinking.learnt` says so.
        """
        mask_BT = completion.mask_BT
        if self.thoughts is not None and self.thoughts.thinking.learnt == "answer":
            mask_BT = self.thoughts.answer_mask(completion, self.opens_thought)
        positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        return mask_BT & (positions_T >= self.skip_first_tokens)

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
        return sequence_mean(self.divergence(student_logits_BTV, teacher_logits_BTV), mask_BT)

    def divergence(self, student_logits_BTV: Tensor, teacher_logits_BTV: Tensor) -> Tensor:
        """The divergence that the settings ask for, token by token: `[B, T]`."""
        student_BTV = student_logits_BTV.float() / self.sampling.temperature
        teacher_BTV = teacher_logits_BTV.float() / self.sampling.temperature
        if self.divergence_top_k is None:
            return token_divergence(student_BTV, teacher_BTV, self.alpha)
        return bucket_divergence(student_BTV, teacher_BTV, self.divergence_top_k, self.alpha)

    # ---------------------------------------------------------------- logging

    def _log_step(
        self, batch: Batch, draw: Draw, loss: Tensor, compared: HiddenLoss | LogitsLoss
    ) -> None:
        found = self.log_means({"train/divergence": loss}, compared.sequences)
        values: dict[str, float | Tensor] = {
            "train/completion_length": batch.mean(draw.completion.lengths_B),
            "train/truncated": batch.mean(draw.completion.truncated_B),
            "train/repetition": batch.mean(repetition(draw.completion)),
        }
        if self.horizon is not None:
            values["train/horizon"] = float(draw.limit)
        if self.updates_per_generation > 1:
            values["train/staleness"] = float(self.global_step - draw.version)
        if self.thoughts is not None:
            figures = self.thoughts.figures(draw.completion, self.opens_thought)
            values |= {f"train/{name}": batch.mean(value_B) for name, value_B in figures.items()}
        self.log_means(values, batch.count)
        if (importance := compared.importance) is not None:
            self.log_means(importance.scalars(), len(importance.weights_N))
        if compared.echoes is not None:
            counted, masked = compared.echoes
            self.log_means({"train/echoes": masked / counted.clamp(min=1)}, counted)
        shown = found["train/divergence"]
        self.log("divergence", shown, prog_bar=True, logger=False, batch_size=len(batch))
        compared.track()

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the rollouts that were drawn ahead, those of every process."""
        super().on_save_checkpoint(checkpoint)
        if self.updates_per_generation > 1:
            checkpoint["rollouts"] = of_all_ranks(self.window.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back this process's rollouts (see `StudentModule.on_load_checkpoint`)."""
        super().on_load_checkpoint(checkpoint)
        states = checkpoint.get("rollouts", [])
        if self.updates_per_generation > 1 and len(states) == ranks():
            self.window.load_state_dict(states[self.global_rank])
