"""AdamW with bfloat16 moments against torch's AdamW, and torch's in one pass."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from conftest import make_model
from lightning.pytorch import Trainer
from torch import Tensor, nn

from sdft.optim import AdamWBF16, fuse_on_cpu
from sdft.student import StudentModule


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0
) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        torch.manual_seed(step)
        inputs = torch.randn(16, 8)
        loss = (model(inputs) - inputs.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, 8)


def test_it_learns_as_adamw_does() -> None:
    ours, theirs = network(), network()
    options = {"lr": 1e-2, "weight_decay": 0.01}
    our_losses = train(ours, AdamWBF16(ours.parameters(), **options), 300)
    their_losses = train(theirs, torch.optim.AdamW(theirs.parameters(), **options), 300)
    assert our_losses[-1] < 0.02 * our_losses[0]
    moved = [
        torch.cat(
            [(a - b).flatten() for a, b in zip(m.parameters(), network().parameters(), strict=True)]
        )
        for m in (ours, theirs)
    ]
    assert (moved[0] - moved[1]).norm() < 0.03 * moved[1].norm()
    assert our_losses[-1] == pytest.approx(their_losses[-1], rel=0.3)


def test_the_first_step_is_adamws_to_rounding() -> None:
    ours, theirs = network(), network()
    train(ours, AdamWBF16(ours.parameters(), lr=1e-2), 1)
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0), 1)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_second_moment_does_not_stand_still() -> None:
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = AdamWBF16([parameter], lr=0.0)
    for size in [1.0] * 200 + [2.0] * 200:
        parameter.grad = torch.full_like(parameter, size)
        optimizer.step()
    decay = 0.999**200
    expected = decay * (1 - decay) + (1 - decay) * 4
    assert optimizer.state[parameter]["exp_avg_sq"].float().mean().item() == pytest.approx(
        expected, rel=0.01
    )


def test_the_moments_take_half_of_the_memory() -> None:
    def size(optimizer: torch.optim.Optimizer) -> int:
        tensors = [v for s in optimizer.state.values() for v in s.values() if v.dim() > 0]
        return sum(value.nbytes for value in tensors)

    model = make_model()
    sizes = []
    for kind in (AdamWBF16, torch.optim.AdamW):
        optimizer = kind(model.parameters(), lr=1e-3)
        model(torch.tensor([[4, 5, 6]]), labels=torch.tensor([[4, 5, 6]])).loss.backward()
        optimizer.step()
        sizes.append(size(optimizer))
    assert 2 * sizes[0] == sizes[1]


def test_a_resumed_optimizer_goes_on_bit_for_bit() -> None:
    whole = network()
    train(whole, AdamWBF16(whole.parameters(), lr=1e-2), 6)
    first = network()
    optimizer = AdamWBF16(first.parameters(), lr=1e-2)
    train(first, optimizer, 3)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(first.state_dict())
    second = network()
    second.load_state_dict(weights)
    resumed = AdamWBF16(second.parameters(), lr=1e-2)
    resumed.load_state_dict(saved)
    train(second, resumed, 3, first=3)
    found: list[Tensor] = list(second.parameters())
    assert all(torch.equal(a, b) for a, b in zip(found, whole.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be 0 or more, found -1.0"),
        ({"eps": float("nan")}, "eps must be 0 or more, found nan"),
        ({"betas": (0.9, 1.0)}, "betas must lie in [0, 1), found (0.9, 1.0)"),
    ],
)
def test_bad_values(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AdamWBF16(network().parameters(), **options)  # type: ignore[arg-type]


def test_restored_moments_are_bf16_and_go_on_alike() -> None:
    """torch restores an optimizer's state in the parameters' type."""
    model = network()
    optimizer = AdamWBF16(model.parameters(), lr=1e-2)
    train(model, optimizer, 3)
    twin = copy.deepcopy(model)
    again = AdamWBF16(twin.parameters(), lr=1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2, first=3)
    train(twin, again, 2, first=3)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
        assert again.state[other]["exp_avg"].dtype == torch.bfloat16


# ---------------------------------------------------------------- torch's in one pass


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_one_pass_is_the_same_arithmetic(kind: type[torch.optim.Optimizer]) -> None:
    plain, fused = network(), network()
    optimizers = [kind(m.parameters(), lr=1e-2, weight_decay=0.01) for m in (plain, fused)]  # type: ignore[call-arg]
    fuse_on_cpu(optimizers[1])
    assert [o.param_groups[0]["fused"] for o in optimizers] == [None, True]
    train(plain, optimizers[0], 50)
    train(fused, optimizers[1], 50)
    torch.testing.assert_close(plain.weight, fused.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chosen", [{"fused": False}, {"foreach": True}, {"differentiable": True}])
def test_what_somebody_chose_stays(chosen: dict[str, bool]) -> None:
    optimizer = torch.optim.AdamW(network().parameters(), **chosen)
    before = dict(optimizer.param_groups[0])
    fuse_on_cpu(optimizer)
    assert optimizer.param_groups[0] == before


def test_other_optimizers_and_types_stay() -> None:
    sgd = torch.optim.SGD(network().parameters(), lr=0.1)
    half = torch.optim.AdamW(network().bfloat16().parameters())
    for optimizer in (sgd, half):
        fuse_on_cpu(optimizer)
        assert optimizer.param_groups[0]["fused"] is None


def test_mixed_precision_still_clips(fit: Callable[..., tuple[Trainer, StudentModule]]) -> None:
    trainer, _ = fit(precision="bf16-mixed", gradient_clip_val=0.5, max_steps=1)
    assert trainer.optimizers[0].param_groups[0]["fused"]
