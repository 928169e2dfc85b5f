"""SDFT's loss of one batch from whole logits: the way of a loss of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdft.batch import Batch
from sdft.importance import Importance, has_dropout, token_log_probs
from sdft.losses import sequence_mean, token_divergence
from sdft.packing import unpack
from sdft.rollout import Rollout

if TYPE_CHECKING:
    from sdft.module import SDFTModule


class LogitsLoss:
    """The module's overridable `score`, `student_logits` and `loss`, one after another.

    Args:
        module: Has them.
        batch: B rows.
        completion: Their completions.

    Attributes:
        sequences: How many of them have tokens that count.
        importance: Of all completion tokens that count, where the rollout came with
            log-probabilities.
        echoes: How many tokens counted, and how many of them were masked as echoes; None where
            nobody asks.
    """

    def __init__(self, module: SDFTModule, batch: Batch, completion: Rollout) -> None:
        self.module, self.batch, self.completion = module, batch, completion
        self._mask_BT = batch.counted(module.loss_mask(completion))
        self.sequences = self._mask_BT.any(-1).sum()
        self.importance: Importance | None = None
        self._teacher_BTV: Tensor | None = None
        self._student_BTV: Tensor | None = None
        self._apart_BT: Tensor | None = None
        self.echoes: Tensor | None = None

    def score(self) -> None:
        """Compute the teacher's logits."""
        self._teacher_BTV = self.module.score(self.batch, self.completion)
        if self.module.mask_echoes is not None:
            self._apart_BT = self._apart(self._teacher_BTV)

    @torch.no_grad()
    def _apart(self, teacher_BTV: Tensor) -> Tensor:
        """KL(teacher ‖ teacher with a wrong demonstration); infinite where it saw none."""
        wrong, seen_B = self.module.wrong_demonstrations(self.batch)
        apart_BT = self._forward_kl(self.module.score(wrong, self.completion), teacher_BTV)
        unseen_B = ~torch.tensor(seen_B, device=apart_BT.device)
        return apart_BT.masked_fill(unseen_B[:, None], torch.inf)

    def _forward_kl(self, student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
        temperature = self.module.sampling.temperature
        return token_divergence(
            student_BTV.float() / temperature, teacher_BTV.float() / temperature
        )

    @torch.no_grad()
    def _kept(self, student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor | None:
        """Tokens that do not only echo the demonstration (see `sdft.echoes`); None: nobody asks."""
        if self._apart_BT is None:
            return None
        assert self.module.mask_echoes is not None
        taught_BT = self._forward_kl(student_BTV, teacher_BTV)
        echoes_BT = self._apart_BT < self.module.mask_echoes * taught_BT
        self.echoes = torch.stack([self._mask_BT.sum(), (self._mask_BT & echoes_BT).sum()]).float()
        return ~echoes_BT

    def loss(self) -> Tensor:
        """Compare the student with what `score` found."""
        module, completion, teacher_BTV = self.module, self.completion, self._teacher_BTV
        assert teacher_BTV is not None
        student_BTV = module.student_logits(self.batch, completion)
        self._student_BTV = student_BTV.detach()
        kept_BT = self._kept(self._student_BTV, teacher_BTV)
        if completion.logps_BT is None:
            if kept_BT is None or module.has_own_loss:
                mask_BT = self._mask_BT if kept_BT is None else self._mask_BT & kept_BT
                return module.loss(student_BTV, teacher_BTV, mask_BT)
            return sequence_mean(
                kept_BT * module.divergence(student_BTV, teacher_BTV), self._mask_BT
            )
        check_weighable(module, "the rollouts have log-probabilities of their own")
        importance = self._weigh(self._student_BTV, completion.logps_BT)
        counted_N = self.batch.counted(completion.mask_BT)[completion.mask_BT]
        self.importance = importance.rows(counted_N)
        weights_BT = unpack(importance.weights_N, completion.mask_BT)
        if kept_BT is not None:
            weights_BT = weights_BT * kept_BT
        divergence_BT = module.divergence(student_BTV, teacher_BTV)
        return sequence_mean(weights_BT * divergence_BT, self._mask_BT)

    def _weigh(self, student_BTV: Tensor, drawn_BT: Tensor) -> Importance:
        module, mask_BT = self.module, self.completion.mask_BT
        if has_dropout(module.model):
            now_N = module.log_probs(self.batch, self.completion)[mask_BT]
        else:
            ids_N = self.completion.ids_BT[mask_BT]
            now_N = token_log_probs(student_BTV[mask_BT], ids_N, module.sampling)
        return Importance.of(now_N, drawn_BT[mask_BT], module.importance_cap)

    def track(self) -> None:
        """Log what is costly, now and then."""
        assert self._student_BTV is not None
        prompts, real = self.batch.student_ids, self.batch.real
        self.module.track({}, prompts, self.completion, self._student_BTV, real)


def check_weighable(module: SDFTModule, why: str) -> None:
    """See whether importance weights can enter the module's loss.

    Args:
        module: The method.
        why: What asks for them.

    Raises:
        ValueError: Its `loss` is its own.
    """
    if module.has_own_loss:
        raise ValueError(
            f"{why}: the loss must be weighted token by token, and {type(module).__name__} has a "
            "`loss` of its own: set model.stale to ignore or recompute, and take an engine that "
            "draws from the student itself"
        )
