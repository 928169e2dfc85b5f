"""Losses of rows whose gradients are taken in the forward pass, by one sweep over the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdft.sweep import Gradients, Head, Objective, Sweep, SweepSettings, Wanted


def swept_loss(
    settings: SweepSettings, objective: Objective, student: Head, weights_N: Tensor | None
) -> Tensor:
    """The objective of each row, times its weight; carries the student's gradients.

    The head's gradient presumes one upstream gradient for all rows. Another one is right too, and
    costs a second sweep.

    Args:
        settings: How the logits are made.
        objective: The loss of a row.
        student: Hidden states and head; get the gradients.
        weights_N: `[N]`, without a gradient; None for 1 each.

    Returns:
        `[N]`.
    """
    tracked = torch.is_grad_enabled()
    values_N: Tensor = _Swept.apply(  # type: ignore[no-untyped-call]
        settings, objective, tracked, *student, weights_N, *objective.tensors
    )
    return values_N


class _Swept(torch.autograd.Function):
    """Takes the student's hidden states, weight and bias, the weights, the objective's tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: SweepSettings,
        objective: Objective,
        tracked: bool,
        *tensors: Tensor | None,
    ) -> Tensor:
        wanted = Wanted(*(tracked and needed for needed in ctx.needs_input_grad[3:6]))
        student = Head(*tensors[:3])  # type: ignore[arg-type]
        values_N, gradients = _swept(settings, objective, student, tensors[3], wanted)
        if any(wanted):
            ctx.settings, ctx.objective, ctx.gradients = settings, objective, gradients
            ctx.save_for_backward(*tensors)  # the objective's, too: they must not change
        return values_N

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        # torch's once_differentiable lets this pass where the upstream gradient is a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a loss in chunks has no second derivative: create_graph=True is not possible "
                "through it, take the loss of whole logits"
            )
        _, weight_VD, bias_V, weights_N, *_ = ctx.saved_tensors
        hidden, weight, bias = ctx.needs_input_grad[3:6]
        factors_N = upstream_N if weights_N is None else upstream_N * weights_N
        hidden_ND = _times_rows(ctx.gradients.hidden_ND, factors_N) if hidden else None
        others = [None] * (len(ctx.needs_input_grad) - 6)
        if not (weight or bias):
            return None, None, None, hidden_ND, None, None, *others
        head = _head_gradients(ctx, upstream_N, factors_N)
        weight_VD, bias_V = _as(head.weight_VD, weight_VD), _as(head.bias_V, bias_V)
        return None, None, None, hidden_ND, weight_VD, bias_V, *others


def _swept(
    settings: SweepSettings,
    objective: Objective,
    student: Head,
    weights_N: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor, Gradients]:
    with torch.autocast(student.hidden_ND.device.type, enabled=False):
        return Sweep(settings, objective, student, weights_N, wanted).run()


def _head_gradients(ctx: Any, upstream_N: Tensor, factors_N: Tensor) -> Gradients:
    """Those of the forward pass, used up, if the upstream gradient is what they presume."""
    ready: Gradients = ctx.gradients
    ctx.gradients = Gradients(ready.hidden_ND, None, None)
    summed = [total for total in (ready.weight_VD, ready.bias_V) if total is not None]
    if summed and _uniform(upstream_N):
        for total in summed:
            total.mul_(upstream_N[0] if len(upstream_N) else 1.0)
        return ready
    del ready, summed
    wanted = Wanted(False, *ctx.needs_input_grad[4:6])
    student = Head(*ctx.saved_tensors[:3])
    return _swept(ctx.settings, ctx.objective, student, factors_N, wanted)[1]


def _uniform(upstream_N: Tensor) -> bool:
    """Whether one factor serves all; 0 does not, since rows that do not count may hold NaN."""
    return bool(((upstream_N == upstream_N[:1]) & (upstream_N != 0)).all())


def _times_rows(gradient_ND: Tensor, factors_N: Tensor) -> Tensor:
    """Each row times its factor; 0 hides whatever the row holds."""
    product = gradient_ND * factors_N[:, None]
    return product.masked_fill_((factors_N == 0)[:, None], 0.0).to(gradient_ND.dtype)


def _as(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)
