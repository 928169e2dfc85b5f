"""One batch's update in micro-batches: the activations of only one of them exist at a time.

Lightning calls `backward` once, on the loss that a step returns. So the backward passes of the
micro-batches happen in the forward one, on stand-ins for the trained parameters, and the loss's own
backward pass hands out what they have summed up. Whatever hangs on the parameters' gradients
(accumulation, clipping, the hooks of DDP, an optimizer's `zero_grad` in between) sees one ordinary
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from sdft.packing import micro_batches
from sdft.rollout import Rollout


def check_micro_batches(strategy: Strategy, method: str, compares_hidden: bool) -> None:
    """See whether the update can be divided.

    Args:
        strategy: The trainer's.
        method: Name of the module's class.
        compares_hidden: Whether its loss is taken from hidden states.

    Raises:
        ValueError: Gradients are sharded, or the loss is one over whole logits.
    """
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(
            "model.micro_batch_tokens needs whole parameters (one device, or DDP), found the "
            f"strategy {type(strategy).__name__}: leave it unset, with a smaller data.batch_size "
            "and trainer.accumulate_grad_batches"
        )
    if not compares_hidden:
        raise ValueError(
            f"model.micro_batch_tokens divides the loss from hidden states, and {method} takes "
            "its loss from whole logits: leave it unset, with a smaller data.batch_size and "
            "trainer.accumulate_grad_batches"
        )


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Some rows of a batch.

    Attributes:
        rows: Ascending.
        places: Where their completion tokens stand among those of the whole batch, `[N_m]`.
    """

    rows: list[int]
    places: Tensor


def divide(
    prompts: Sequence[Sequence[int]],
    completion: Rollout,
    token_budget: int | None,
    padded: bool = False,
) -> list[MicroBatch]:
    """Micro-batches of at most so many tokens of prompts and completions.

    Args:
        prompts: B prompts.
        completion: B completions.
        token_budget: None makes one micro-batch of all rows; a row with more stands alone.
        padded: Count padding.
    """
    lengths = [len(p) + n for p, n in zip(prompts, completion.lengths_B.tolist(), strict=True)]
    divided = [list(range(len(lengths)))]
    if token_budget is not None:
        divided = micro_batches(lengths, token_budget, padded)
    rows_N = completion.mask_BT.nonzero()[:, 0]
    return [
        MicroBatch(rows, torch.isin(rows_N, rows_N.new_tensor(rows)).nonzero()[:, 0])
        for rows in divided
    ]


def summed(parts: Sequence[Callable[[], Tensor]], model: nn.Module, scale: float = 1.0) -> Tensor:
    """The sum of the losses, one after another, with the gradient of `model`'s trained parameters.

    Nothing else that a loss depends on gets a gradient.

    Args:
        parts: Each computes a scalar from the model.
        model: Its trained parameters are leaves.
        scale: The backward passes of the parts start from it, for gradients that half precision
            would round to 0 (a loss scaler's factor); the result does not depend on it.
    """
    if not torch.is_grad_enabled():
        return torch.stack([part() for part in parts]).sum()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total: Tensor = _Summed.apply(parts, model, scale, *trained)  # type: ignore[no-untyped-call]
    return total


class _Summed(torch.autograd.Function):
    """Takes the parts, the model, the scale and the trained parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        parts: Sequence[Callable[[], Tensor]],
        model: nn.Module,
        scale: float,
        *trained: nn.Parameter,
    ) -> Tensor:
        losses = []
        with torch.enable_grad(), _stand_ins(model, trained) as leaves:
            for part in parts:
                loss = part()
                losses.append(loss.detach())
                with torch.autocast(loss.device.type, enabled=False):
                    (loss * scale).backward()
        ctx.scale, ctx.gradients = scale, [leaf.grad for leaf in leaves]
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Given away, not kept: the parameters take them over without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of an update in micro-batches are handed out once")
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(upstream / ctx.scale)
        return None, None, None, *gradients


@contextmanager
def _stand_ins(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Leaves on the trained parameters' memory, in their places in the model.

    Gradients sum up in them, in place; the parameters themselves, and their hooks, see nothing.
    They stay during the backward passes, for layers that are computed again there.
    """
    leaves = {id(parameter): nn.Parameter(parameter.detach()) for parameter in trained}
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in leaves
    ]
    try:
        for module, name, parameter in places:
            module._parameters[name] = leaves[id(parameter)]
        yield list(leaves.values())
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
