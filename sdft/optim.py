"""AdamW with bfloat16 moments: half of its memory, no update lost; torch's own in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sdft.ranks import rank
from sdft.rounding import stochastic_round
from sdft.seeding import derive_seed
from sdft.sharding import local


def fuse_on_cpu(optimizer: Optimizer) -> None:
    """Have torch's Adam and AdamW go through CPU parameters once, where nobody chose otherwise.

    torch does so on request alone, by `fused=True`, which Lightning takes for an optimizer that
    undoes the scaling of mixed precision and then refuses to clip gradients. Set in the groups it
    is the same arithmetic, three times as fast.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        unset = group["fused"] is None and not group["foreach"] and not group["differentiable"]
        if unset and all(_exact_on_cpu(parameter) for parameter in group["params"]):
            group["fused"] = True


def _exact_on_cpu(parameter: Tensor) -> bool:
    exact = parameter.dtype in (torch.float32, torch.float64)
    return exact and type(parameter) is Parameter and parameter.device.type == "cpu"


class AdamWBF16(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) whose moments are kept in bfloat16.

    Each step computes in fp32 and rounds the moments stochastically: the second moment moves by a
    thousandth of itself per step, less than bfloat16 resolves, and would stand still otherwise.
    The rounding is a function of the step, so a resumed run equals an uninterrupted one. Keep the
    parameters in fp32.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Decay of the first and of the second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"AdamWBF16: {name} must be 0 or more, found {value}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"AdamWBF16: betas must lie in [0, 1), found {betas}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, group, (number, place))
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], place: tuple[int, int]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        for name in ("exp_avg", "exp_avg_sq"):  # torch restores moments in the parameter's type
            state[name] = state[name].to(torch.bfloat16)
        state["step"] += 1
        step = int(state["step"])
        assert parameter.grad is not None
        # A sharded parameter's state is sharded alike; what follows sees the shards alone.
        values, gradient = local(parameter), local(parameter.grad).float()
        first_kept, second_kept = local(state["exp_avg"]), local(state["exp_avg_sq"])
        first_beta, second_beta = group["betas"]
        first = first_kept.float().lerp_(gradient, 1 - first_beta)
        second = second_kept.float()
        second.mul_(second_beta).addcmul_(gradient, gradient, value=1 - second_beta)
        shard = () if values is parameter else (rank(),)
        seed = derive_seed("adamw", step, *place, *shard)
        generator = Generator(values.device).manual_seed(seed)
        first_kept.copy_(stochastic_round(first, generator))
        second_kept.copy_(stochastic_round(second, generator))
        scale = math.sqrt(1 - second_beta**step)
        denominator = second.sqrt_().div_(scale).add_(group["eps"])
        values.mul_(1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] / (1 - first_beta**step)
        values.add_(first.div_(denominator).to(values.dtype), alpha=-rate)


def check_rates(optimizer: Optimizer, clip: float | None) -> None:
    """Check the learning rates and the gradient's clipping.

    Raises:
        ValueError: One of them is no finite number, or below 0.
    """
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"the optimizer's lr must be a finite number, 0 or more, found {rate}")
    if clip is not None and not clip >= 0:  # NaN, too
        raise ValueError(f"trainer.gradient_clip_val must be 0 or more, found {clip}")
