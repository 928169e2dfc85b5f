"""SDFT's loss of one batch from hidden states: whole logits never exist."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.batch import Batch
from sdft.head import Head, head
from sdft.head_losses import head_divergence
from sdft.importance import Importance, has_dropout, head_log_probs
from sdft.losses import sequence_weights
from sdft.micro_step import MicroBatch, divide, summed
from sdft.packable import why_not_packable
from sdft.ranks import part_of_mean
from sdft.rollout import Rollout
from sdft.sharding import forwarded
from sdft.states import States, figures, with_head

if TYPE_CHECKING:
    from sdft.module import SDFTModule

Prompts = list[list[int]]


class Grader(NamedTuple):
    """A model that scores some rows of a batch.

    Attributes:
        model: Gets no gradient.
        rows: Ascending.
        prompts: Its own, one for each of these rows.
    """

    model: PreTrainedModel
    rows: list[int]
    prompts: Prompts


class _Graded(NamedTuple):
    """Hidden states of one grader, `[N, D]`, and which of the tokens it scores; None: all."""

    head: Head
    hidden_ND: Tensor
    counts_N: Tensor | None


class HiddenLoss:
    """Scores, compares and keeps what is to be logged.

    Args:
        module: Its `hidden` computes hidden states; its settings say how to compare.
        batch: B rows.
        completion: Their completions.

    Attributes:
        importance: Of all completion tokens, by micro-batches, where the rollout came with
            log-probabilities.
    """

    def __init__(self, module: SDFTModule, batch: Batch, completion: Rollout) -> None:
        self.module, self.batch, self.completion = module, batch, completion
        self._hidden_ND: Tensor | None = None
        self._graded: list[_Graded] = []
        self.importance: Importance | None = None
        mask_BT = batch.counted(module.loss_mask(completion))
        weights_BT = part_of_mean(sequence_weights(mask_BT), mask_BT.any(-1).sum())
        self._weights_N = weights_BT[completion.mask_BT]
        self._drawn_N = None
        if completion.logps_BT is not None:
            self._drawn_N = completion.logps_BT[completion.mask_BT]
        self._importance: list[Importance] = []

    @torch.no_grad()
    def score(self) -> None:
        """Compute the teacher's hidden states at the completion tokens, and those of any other."""
        self._graded = [self._grade(grader) for grader in self.module.graders(self.batch)]

    def _grade(self, grader: Grader) -> _Graded:
        model, rows, prompts = grader
        completion = self.completion
        if len(rows) == len(self.batch):
            found = with_head(model, hidden_in_parts(self.module, model, prompts, completion))
            return _Graded(found.head, found.hidden_ND, None)
        own = completion.rows(rows).trimmed()
        found_ND, known = with_head(model, hidden_in_parts(self.module, model, prompts, own))
        rows_N = completion.mask_BT.nonzero()[:, 0]
        counts_N = torch.isin(rows_N, rows_N.new_tensor(rows))
        hidden_ND = found_ND.new_zeros(len(rows_N), found_ND.shape[1])
        hidden_ND[counts_N] = found_ND
        return _Graded(known, hidden_ND, counts_N)

    def loss(self) -> Tensor:
        """Compare the student with what `score` found, in micro-batches if there is a budget."""
        model = self.module.model
        parts = parts_of(self.module, model, self.batch.student_ids, self.completion)
        losses = [partial(self._loss, part) for part in parts]
        scale = _loss_scale(self.module)
        whole = len(parts) == 1
        loss = forwarded(model, losses[0]) if whole else summed(losses, model, scale)
        if self._importance:
            self.importance = Importance.joined(self._importance)
        return loss

    @torch.no_grad()
    def track(self) -> None:
        """Log what is costly, now and then: the student's entropy and its distance to the base."""
        module, hidden_ND, mask_BT = self.module, self._hidden_ND, self.completion.mask_BT
        if not module.logs_this_step:
            return
        assert hidden_ND is not None
        weights_N = sequence_weights(self.batch.counted(mask_BT))[mask_BT]
        student = with_head(module.model, hidden_ND)
        values = figures(module, weights_N, student, self._of_base)
        module.log_means(values, self.batch.count)

    def _of_base(self, base: PreTrainedModel) -> States:
        prompts = self.batch.student_ids
        return with_head(base, hidden_in_parts(self.module, base, prompts, self.completion))

    def _loss(self, part: MicroBatch) -> Tensor:
        module = self.module
        batch, completion = self.batch.rows(part.rows), self.completion.rows(part.rows).trimmed()
        student_ND = module.hidden(module.model, batch.student_ids, completion)
        self._keep(part, student_ND.detach())
        weights_N = self._weights_N[part.places]
        if self._drawn_N is not None:
            weights_N = weights_N * self._weigh(part, batch, completion, student_ND.detach())
        losses = [self._divergence(part, student_ND, weights_N, graded) for graded in self._graded]
        return torch.stack(losses).sum()

    def _divergence(
        self, part: MicroBatch, student_ND: Tensor, weights_N: Tensor, graded: _Graded
    ) -> Tensor:
        """Weighted sum over the tokens that one grader scores; the others cost nothing."""
        module, student = self.module, head(self.module.model)
        assert student is not None
        if graded.counts_N is not None:
            weights_N = weights_N * graded.counts_N[part.places]
        return head_divergence(
            student_ND,
            student,
            graded.hidden_ND[part.places],
            graded.head,
            alpha=module.alpha,
            temperature=module.sampling.temperature,
            weights_N=weights_N,
            top_k=module.divergence_top_k,
        ).sum()

    def _keep(self, part: MicroBatch, student_ND: Tensor) -> None:
        if self._hidden_ND is None:
            self._hidden_ND = student_ND.new_empty(len(self._weights_N), student_ND.shape[1])
        self._hidden_ND[part.places] = student_ND

    def _weigh(
        self, part: MicroBatch, batch: Batch, completion: Rollout, student_ND: Tensor
    ) -> Tensor:
        """The tokens' importance weights."""
        module = self.module
        assert self._drawn_N is not None
        if has_dropout(module.model):
            now_N = module.log_probs(batch, completion)[completion.mask_BT]
        else:
            ids_N = completion.ids_BT[completion.mask_BT]
            student = head(module.model)
            assert student is not None
            now_N = head_log_probs(student_ND, student, ids_N, module.sampling)
        importance = Importance.of(now_N, self._drawn_N[part.places], module.importance_cap)
        self._importance.append(importance)
        return importance.weights_N


def parts_of(
    module: SDFTModule, model: PreTrainedModel, prompts: Prompts, completion: Rollout
) -> list[MicroBatch]:
    """The micro-batches of a pass through the model."""
    budget = module.micro_batch_tokens
    padded = budget is not None and why_not_packable(model) is not None
    return divide(prompts, completion, budget, padded)


def _loss_scale(module: SDFTModule) -> float:
    """The factor of the trainer's loss scaler (precision 16-mixed)."""
    if module._trainer is None:
        return 1.0
    scaler: Any = getattr(module.trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def hidden_in_parts(
    module: SDFTModule, model: PreTrainedModel, prompts: Prompts, completion: Rollout
) -> Tensor:
    """`module.hidden` without a gradient, by micro-batches: `[N, D]`."""
    parts = parts_of(module, model, prompts, completion)
    if len(parts) == 1:
        return module.hidden(model, prompts, completion)
    hidden_ND: Tensor | None = None
    for part in parts:
        given = [prompts[row] for row in part.rows]
        found = module.hidden(model, given, completion.rows(part.rows).trimmed())
        if hidden_ND is None:
            hidden_ND = found.new_empty(int(completion.mask_BT.sum()), found.shape[1])
        hidden_ND[part.places] = found
    assert hidden_ND is not None
    return hidden_ND
