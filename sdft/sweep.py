"""One pass over rows of hidden states, chunk by chunk: a loss per row and the student's gradients.

What the loss is, an objective says (`sdft.objectives`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

HEAD_ROWS = 16384  # of the head's gradient added at once where that takes a temporary

Rows = slice | Tensor


class Head(NamedTuple):
    """Hidden states `[N, D]` and what turns them into logits: `[V, D]`, and `[V]` or None."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None


@dataclass(frozen=True)
class SweepSettings:
    """How the student's logits are made, and in which types.

    Attributes:
        temperature: Divides the logits.
        softcap: Logits become softcap·tanh(logits / softcap) before.
        vocabulary: Only the first so many tokens exist.
        chunk_size: Rows at once.
        student_dtype: Of the student's products.
        dtype: Of the losses and of all sums.
    """

    temperature: float
    softcap: float | None
    vocabulary: int
    chunk_size: int
    student_dtype: torch.dtype
    dtype: torch.dtype


Visit = Callable[[Rows, Tensor, list[Tensor], bool], Tensor]
"""Takes rows, their log-probabilities `[rows, V]`, scratch tensors of that shape, and whether some
log-probabilities may be −inf. Returns the losses, `[rows]`; the log-probabilities have become the
gradient with respect to the logits, temperature aside."""


class Objective(Protocol):
    """A loss of each row's distribution."""

    @property
    def scratch(self) -> int:
        """Tensors `[rows, V]` that a visit overwrites, at least 1."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the rows are compared with; gets no gradient."""

    def begin(self, settings: SweepSettings) -> Visit:
        """Ready for one sweep."""


class Wanted(NamedTuple):
    """Which of the student's tensors need a gradient."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass
class Gradients:
    """The student's gradients, where they are wanted.

    Attributes:
        hidden_ND: Of each token's own loss, whatever its weight; in the hidden states' type.
        weight_VD: Of the weighted sum over the tokens; in the type of the sums.
        bias_V: The same.
    """

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def zeros(cls, student: Head, wanted: Wanted, dtype: torch.dtype) -> Gradients:
        """Nothing summed yet."""
        hidden_ND, weight_VD, bias_V = student
        return cls(
            torch.zeros_like(hidden_ND) if wanted.hidden else None,
            torch.zeros_like(weight_VD, dtype=dtype) if wanted.weight else None,
            torch.zeros_like(bias_V, dtype=dtype) if wanted.bias and bias_V is not None else None,
        )


class Sweep:
    """Goes through the tokens whose weight is not 0.

    Args:
        settings: How the logits are made.
        objective: What to compute.
        student: Its hidden states and head.
        weights_N: `[N]`, or None for 1 each.
        wanted: Gradients to compute.
    """

    def __init__(
        self,
        settings: SweepSettings,
        objective: Objective,
        student: Head,
        weights_N: Tensor | None,
        wanted: Wanted,
    ) -> None:
        self.settings, self.wanted = settings, wanted
        self.scratch, self.objective = objective.scratch, objective.begin(settings)
        self.values_N = student.hidden_ND.new_zeros(len(student.hidden_ND), dtype=settings.dtype)
        self.gradients = Gradients.zeros(student, wanted, settings.dtype)
        self.weights_N = None if weights_N is None else weights_N.to(settings.dtype)
        # A mean's weights are small. Relative ones keep fp16 products in range.
        self.scale = _largest(self.weights_N)
        self.student = ChunkedLogits(student, settings, settings.student_dtype)

    def run(self) -> tuple[Tensor, Gradients]:
        """The weighted losses, `[N]`, and the gradients."""
        buffers = self._buffers()
        for rows, count in self._chunks():
            self._visit(rows, [buffer[:count] for buffer in buffers])
        self._finish()
        return self.values_N, self.gradients

    def _chunks(self) -> Iterator[tuple[Rows, int]]:
        size, tokens = self.settings.chunk_size, len(self.values_N)
        if self.weights_N is None:
            for start in range(0, tokens, size):
                yield slice(start, start + size), min(size, tokens - start)
        else:
            for rows in self.weights_N.nonzero().squeeze(-1).split(size):
                yield rows, len(rows)

    def _buffers(self) -> list[Tensor]:
        """For the log-probabilities, scratch, and one for the soft cap's derivative."""
        count = 1 + self.scratch + self._capped
        shape = (min(self.settings.chunk_size, len(self.values_N)), self.settings.vocabulary)
        return [self.values_N.new_empty(shape) for _ in range(count)]

    @property
    def _capped(self) -> bool:
        return self.settings.softcap is not None and any(self.wanted)

    def _visit(self, rows: Rows, buffers: list[Tensor]) -> None:
        student, *scratch = buffers
        slope = scratch.pop() if self._capped else None
        self.student.log_probs(rows, scratch[-1], student, slope)
        self.values_N[rows] = self.objective(rows, student, scratch, self.student.masked)
        if any(self.wanted):
            self._add(rows, student if slope is None else student.mul_(slope))

    def _add(self, rows: Rows, gradient: Tensor) -> None:
        """Carry the gradient of the chunk's logits, `[rows, V]`, on to hidden states and head."""
        product = gradient.to(self.settings.student_dtype)
        if self.gradients.hidden_ND is not None:
            hidden = product @ self.student.weight_VD
            self.gradients.hidden_ND[rows] = hidden.to(self.gradients.hidden_ND.dtype)
        if self.gradients.weight_VD is not None:
            total = self.gradients.weight_VD[: self.settings.vocabulary]
            # A GPU multiplies in the narrow type and sums in fp32; elsewhere all is fp32.
            narrow = product.is_cuda and total.dtype == torch.float32
            _add_product(total, product if narrow else gradient, self._weighted_hidden(rows))
        if self.gradients.bias_V is not None:
            total = self.gradients.bias_V[: self.settings.vocabulary]
            total.addmv_(gradient.t(), self._relative_weights(rows, len(gradient)))

    def _relative_weights(self, rows: Rows, count: int) -> Tensor:
        if self.weights_N is None:
            return self.values_N.new_ones(count)
        return self.weights_N[rows] / self.scale

    def _weighted_hidden(self, rows: Rows) -> Tensor:
        hidden = self.student.hidden_ND[rows].to(self.settings.dtype)
        if self.weights_N is None:
            return hidden
        return hidden * self._relative_weights(rows, len(hidden))[:, None]

    def _finish(self) -> None:
        if self.weights_N is not None:
            self.values_N.mul_(self.weights_N)
        if self.gradients.hidden_ND is not None:
            self.gradients.hidden_ND.div_(self.settings.temperature)
        for summed in (self.gradients.weight_VD, self.gradients.bias_V):
            if summed is not None:
                summed.mul_(self.scale / self.settings.temperature)


class ChunkedLogits:
    """A head over the vocabulary of a sweep, in the type of its products.

    Args:
        head: Hidden states and what turns them into logits.
        settings: Vocabulary, cap and temperature.
        dtype: Of the products.
    """

    def __init__(self, head: Head, settings: SweepSettings, dtype: torch.dtype) -> None:
        self.hidden_ND = head.hidden_ND
        self.weight_VD = head.weight_VD[: settings.vocabulary].to(dtype)
        self.bias_V = None
        if head.bias_V is not None:
            self.bias_V = head.bias_V[: settings.vocabulary].to(settings.dtype)
        self.masked = self.bias_V is not None and bool((self.bias_V == -math.inf).any())
        self.softcap, self.temperature = settings.softcap, settings.temperature

    def log_probs(
        self, rows: Rows, logits: Tensor, out: Tensor, slope: Tensor | None = None
    ) -> None:
        """Write log-probabilities to `out`, the soft cap's derivative to `slope`."""
        hidden = self.hidden_ND[rows].to(self.weight_VD.dtype)
        if hidden.dtype == logits.dtype:
            torch.mm(hidden, self.weight_VD.t(), out=logits)
        else:
            logits.copy_(hidden @ self.weight_VD.t())
        if self.bias_V is not None:
            logits.add_(self.bias_V)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_()
            if slope is not None:
                torch.mul(logits, logits, out=slope).neg_().add_(1)
            logits.mul_(self.softcap)
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        torch.log_softmax(logits, -1, out=out)


def _add_product(total_VD: Tensor, gradient_NV: Tensor, hidden_ND: Tensor) -> None:
    """Add gradient.T @ hidden to the total, in the total's type whatever the gradient's."""
    if gradient_NV.dtype == total_VD.dtype:
        total_VD.addmm_(gradient_NV.t(), hidden_ND)
        return
    hidden_ND = hidden_ND.to(gradient_NV.dtype)
    blocks = zip(total_VD.split(HEAD_ROWS), gradient_NV.split(HEAD_ROWS, dim=1), strict=True)
    for total, gradient in blocks:
        total.add_(torch.mm(gradient.t(), hidden_ND, out_dtype=total_VD.dtype))


def _largest(weights_N: Tensor | None) -> Tensor | float:
    """The largest absolute weight; 1 if none is above 0."""
    if weights_N is None or len(weights_N) == 0:
        return 1.0
    largest = weights_N.abs().amax()
    return torch.where(largest > 0, largest, torch.ones_like(largest))
