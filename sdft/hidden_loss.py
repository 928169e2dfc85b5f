"""SDFT's loss of one batch from hidden states: whole logits never exist."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.batch import Batch
from sdft.head import Head, gathered_head
from sdft.head_losses import head_divergence
from sdft.importance import Importance, has_dropout, head_log_probs
from sdft.losses import sequence_weights
from sdft.micro_step import MicroBatch, divide, summed
from sdft.packable import why_not_packable
from sdft.rollout import Rollout
from sdft.states import States, figures, learnt

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
    """Hidden states of one grader, `[N, D]`, and which of the tokens it scores; None: all.

    `apart_N` is its divergence from itself with a wrong demonstration, infinite where it saw none;
    None where nobody asks.
    """

    head: Head
    hidden_ND: Tensor
    counts_N: Tensor | None
    apart_N: Tensor | None = None


class HiddenLoss:
    """Scores, compares and keeps what is to be logged.

    Args:
        module: Its `hidden` computes hidden states; its settings say how to compare.
        batch: B rows.
        completion: Their completions.

    Attributes:
        sequences: How many of them have tokens that count.
        importance: Of all completion tokens that count, by micro-batches, where the rollout came
            with log-probabilities.
        echoes: How many tokens counted, and how many of them were masked as echoes; None where
            nobody asks.
    """

    def __init__(self, module: SDFTModule, batch: Batch, completion: Rollout) -> None:
        self.module, self.batch, self.completion = module, batch, completion
        self._hidden_ND: Tensor | None = None
        self._graded: list[_Graded] = []
        self.importance: Importance | None = None
        mask_BT = batch.counted(module.loss_mask(completion))
        self.sequences = mask_BT.any(-1).sum()
        self._weights_N = sequence_weights(mask_BT)[completion.mask_BT]
        self._counted_N = batch.counted(completion.mask_BT)[completion.mask_BT]
        self._drawn_N = None
        if completion.logps_BT is not None:
            self._drawn_N = completion.logps_BT[completion.mask_BT]
        self._importance: list[Importance] = []
        self.echoes = None if module.mask_echoes is None else self._weights_N.new_zeros(2)

    @torch.no_grad()
    def score(self) -> None:
        """Compute the teacher's hidden states at the completion tokens, and those of any other."""
        module = self.module
        graders = module.graders(self.batch)
        self._graded = [self._grade(grader) for grader in graders]
        if module.mask_echoes is None:
            return
        wrong, seen_B = module.wrong_demonstrations(self.batch)
        for place, (right, other) in enumerate(zip(graders, module.graders(wrong), strict=True)):
            if right.model is module.teacher:
                apart_N = self._apart(self._graded[place], self._grade(other), seen_B)
                self._graded[place] = self._graded[place]._replace(apart_N=apart_N)

    def _apart(self, right: _Graded, wrong: _Graded, seen_B: list[bool]) -> Tensor:
        """KL(right ‖ wrong) per token, `[N]`: infinite where nothing wrong was seen."""
        rows_N = self.completion.mask_BT.nonzero()[:, 0]
        seen_N = torch.tensor(seen_B, device=rows_N.device)[rows_N]
        if right.counts_N is not None:
            seen_N = seen_N & right.counts_N
        apart_N = head_divergence(
            wrong.hidden_ND,
            wrong.head,
            right.hidden_ND,
            right.head,
            temperature=self.module.sampling.temperature,
            weights_N=seen_N.float(),
        )
        return apart_N.masked_fill(~seen_N, torch.inf)

    def _grade(self, grader: Grader) -> _Graded:
        model, rows, prompts = grader
        everything, completion = len(rows) == len(self.batch), self.completion
        own = completion if everything else completion.rows(rows).trimmed()
        found_ND = hidden_in_parts(self.module, model, prompts, own)
        known = gathered_head(model, found_ND.dtype)
        assert known is not None
        if everything:
            return _Graded(known, found_ND, None)
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
        loss = losses[0]() if len(parts) == 1 else summed(losses, model, scale)
        if self._importance:
            self.importance = Importance.joined(self._importance)
        return loss

    @torch.no_grad()
    def track(self) -> None:
        """Log what is costly, now and then: the student's entropy and its distance to the base."""
        module, hidden_ND = self.module, self._hidden_ND
        if not module.logs_this_step:
            return
        assert hidden_ND is not None
        student = gathered_head(module.model, hidden_ND.dtype)
        assert student is not None
        mask_BT = self.completion.mask_BT
        weights_N = sequence_weights(self.batch.counted(mask_BT))[mask_BT]
        values = figures(module, weights_N, States(hidden_ND, student), self._of_base)
        module.log_means(values, self.batch.count)

    def _of_base(self, base: PreTrainedModel) -> States:
        hidden_ND = hidden_in_parts(self.module, base, self.batch.student_ids, self.completion)
        known = gathered_head(base, hidden_ND.dtype)
        assert known is not None
        return States(hidden_ND, known)

    def _loss(self, part: MicroBatch) -> Tensor:
        module = self.module
        batch, completion = self.batch.rows(part.rows), self.completion.rows(part.rows).trimmed()
        now_N = None
        if self._drawn_N is not None and has_dropout(module.model):
            now_N = module.log_probs(batch, completion)[completion.mask_BT]

        def learn(student: States) -> Tensor:
            weights_N = self._weights_N[part.places]
            if self._drawn_N is not None:
                weights_N = weights_N * self._weigh(part, completion, student.detach(), now_N)
            losses = [self._divergence(part, student, weights_N, by) for by in self._graded]
            return torch.stack(losses).sum()

        loss, student = learnt(module, batch.student_ids, completion, learn)
        self._keep(part, student.hidden_ND)
        return loss

    def _divergence(
        self, part: MicroBatch, student: States, weights_N: Tensor, graded: _Graded
    ) -> Tensor:
        """Weighted sum over the tokens that one grader scores; the others cost nothing."""
        module = self.module
        if graded.counts_N is not None:
            weights_N = weights_N * graded.counts_N[part.places]
        if graded.apart_N is not None:
            weights_N = weights_N * ~self._echoes(part, student.detach(), weights_N, graded)
        return head_divergence(
            *student,
            graded.hidden_ND[part.places],
            graded.head,
            alpha=module.alpha,
            temperature=module.sampling.temperature,
            weights_N=weights_N,
            top_k=module.divergence_top_k,
        ).sum()

    @torch.no_grad()
    def _echoes(
        self, part: MicroBatch, student: States, weights_N: Tensor, graded: _Graded
    ) -> Tensor:
        """Which tokens only echo the demonstration (see `sdft.echoes`)."""
        module, counts_N = self.module, (weights_N > 0).float()
        assert graded.apart_N is not None
        assert module.mask_echoes is not None
        taught_N = head_divergence(
            *student,
            graded.hidden_ND[part.places],
            graded.head,
            temperature=module.sampling.temperature,
            weights_N=counts_N,
        )
        echoes_N = graded.apart_N[part.places] < module.mask_echoes * taught_N
        assert self.echoes is not None
        self.echoes += torch.stack([counts_N.sum(), (counts_N * echoes_N).sum()])
        return echoes_N

    def _keep(self, part: MicroBatch, student_ND: Tensor) -> None:
        if self._hidden_ND is None:
            self._hidden_ND = student_ND.new_empty(len(self._weights_N), student_ND.shape[1])
        self._hidden_ND[part.places] = student_ND

    def _weigh(
        self, part: MicroBatch, completion: Rollout, student: States, now_N: Tensor | None
    ) -> Tensor:
        """The tokens' importance weights; log-probabilities are the states' when None."""
        module = self.module
        assert self._drawn_N is not None
        if now_N is None:
            ids_N = completion.ids_BT[completion.mask_BT]
            now_N = head_log_probs(*student, ids_N, module.sampling)
        importance = Importance.of(now_N, self._drawn_N[part.places], module.importance_cap)
        self._importance.append(importance.rows(self._counted_N[part.places]))
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
