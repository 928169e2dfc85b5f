"""Losses of a row's distribution with their gradients in closed form, for a sweep over rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdft.buckets import bucket_divergence_
from sdft.divergence import divergence_, kl, spare_buffers
from sdft.sweep import ChunkedLogits, Head, Objective, Rows, SweepSettings, Visit
from sdft.topk import TopK, log_tail, share_out_


@dataclass(frozen=True, eq=False)
class Divergence(Objective):
    """From a teacher's distribution over the whole vocabulary; see `token_divergence`.

    Attributes:
        teacher: Its hidden states and head.
        alpha: Which divergence, in [0, 1].
        dtype: Of the teacher's products.
        top_k: Tokens compared one by one, below V, all others as one; None: all one by one.
    """

    teacher: Head
    alpha: float
    dtype: torch.dtype
    top_k: int | None = None

    @property
    def scratch(self) -> int:
        """The teacher's log-probabilities, and what the divergence needs."""
        return 1 + spare_buffers(self.alpha)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The teacher's."""
        return tuple(self.teacher)

    def begin(self, settings: SweepSettings) -> Visit:
        """Cast the teacher's head for as long as the sweep goes on."""
        teacher = ChunkedLogits(self.teacher, settings, self.dtype)

        def visit(rows: Rows, student: Tensor, scratch: list[Tensor], masked: bool) -> Tensor:
            other, *spare = scratch
            teacher.log_probs(rows, spare[0], other)
            if self.top_k is not None:
                return bucket_divergence_(student, other, self.alpha, self.top_k)
            return divergence_(student, other, self.alpha, spare, masked or teacher.masked)

        return visit


@dataclass(frozen=True, eq=False)
class CrossEntropy(Objective):
    """Negative log-likelihood of one token: gradient q − one-hot.

    Attributes:
        targets_N: The tokens.
        times_probability: Multiply each by the token's probability, taken as a constant.
    """

    targets_N: Tensor
    times_probability: bool = False

    @property
    def scratch(self) -> int:
        """For the logits alone."""
        return 1

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The targets."""
        return (self.targets_N,)

    def begin(self, settings: SweepSettings) -> Visit:
        """Nothing to prepare."""
        return self._visit

    def _visit(self, rows: Rows, student: Tensor, scratch: list[Tensor], masked: bool) -> Tensor:
        targets_R1 = self.targets_N[rows][:, None]
        chosen_R1 = student.gather(-1, targets_R1)
        student.exp_().scatter_(-1, targets_R1, chosen_R1.expm1())
        if not self.times_probability:
            return -chosen_R1[:, 0]
        p_R1 = chosen_R1.exp()
        student.mul_(p_R1)
        return -(p_R1 * chosen_R1.masked_fill(p_R1 == 0, 0.0))[:, 0]


@dataclass(frozen=True, eq=False)
class TopKDivergence(Objective):
    """Forward KL from K tokens and the mass of all others; see `topk_divergence`.

    Attributes:
        target: Of the N rows: `[N, K]`, `[N, K]` and `[N]`.
    """

    target: TopK

    @property
    def scratch(self) -> int:
        """For the logits alone."""
        return 1

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The target's."""
        return tuple(self.target)

    def begin(self, settings: SweepSettings) -> Visit:
        """Nothing to prepare."""
        return self._visit

    def _visit(self, rows: Rows, student: Tensor, scratch: list[Tensor], masked: bool) -> Tensor:
        ids_RK, kept_RK, tail_R = (part[rows] for part in self.target)
        ids_RK = ids_RK.long()
        wanted = torch.cat([kept_RK, tail_R[:, None]], -1).to(student.dtype)
        found = torch.cat([student.gather(-1, ids_RK), log_tail(student, ids_RK)[:, None]], -1)
        mass = wanted.exp()
        mass[:, -1].masked_fill_(found[:, -1] == -math.inf, 0.0)  # no token to move mass to
        gradient = found.exp() * mass.sum(-1, keepdim=True) - mass
        share_out_(student, ids_RK, found[:, -1:], gradient)
        return kl(wanted, found)
