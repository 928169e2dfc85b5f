"""The average of adapters is the average of their products."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model

from sdft.adapters import adapters, own_parameters, twin, widen
from sdft.lora import LoRA
from sdft.product_average import cut_to_rank, products_moved, update_products

pytest.importorskip("peft")

Products = dict[str, torch.Tensor]


def walk(
    rank: int, steps: int, rate: float, size: float = 0.02
) -> tuple[Products, Products, float]:
    """An average by factors and one by whole products along a student's random walk."""
    model = make_model()
    LoRA(rank=2, alpha=4.0).inject(model)
    teacher = twin(model)
    widen(teacher, rank)
    exact = {name: torch.zeros_like(a.product()).double() for name, a in adapters(model).items()}
    generator, lost = torch.Generator().manual_seed(1), 0.0
    for _ in range(steps):
        for parameter in own_parameters(model):
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
        lost = float(update_products(teacher, model, rate))
        for name, adapter in adapters(model).items():
            exact[name].lerp_(adapter.product().double(), rate)
    return {name: a.product().double() for name, a in adapters(teacher).items()}, exact, lost


def distance(found: Products, exact: Products) -> float:
    errors = [(found[name] - exact[name]).norm() for name in exact]
    return float(
        torch.stack(errors).norm() / torch.stack([e.norm() for e in exact.values()]).norm()
    )


def test_without_a_cap_it_is_the_closed_form_over_hundreds_of_steps() -> None:
    found, exact, lost = walk(rank=1000, steps=300, rate=0.05)
    assert distance(found, exact) < 1e-5
    assert lost < 1e-10


def test_what_a_cap_cuts_is_reported() -> None:
    found, exact, lost = walk(rank=4, steps=100, rate=0.05)
    assert lost > 1e-6
    assert distance(found, exact) > 1e-4
    wider, same, less = walk(rank=8, steps=100, rate=0.05)
    assert distance(wider, same) < distance(found, exact)
    assert less < lost


def test_averaging_the_factors_apart_is_another_matrix() -> None:
    model = make_model()
    LoRA(rank=2, alpha=4.0).inject(model)
    layer = next(iter(adapters(model)))
    apart = [
        torch.zeros_like(t) for t in (adapters(model)[layer].up_OR, adapters(model)[layer].down_RI)
    ]
    exact = torch.zeros_like(adapters(model)[layer].product())
    for _ in range(50):
        for parameter in own_parameters(model):
            parameter.data += 0.02 * torch.randn_like(parameter)
        adapter = adapters(model)[layer]
        exact.lerp_(adapter.product(), 0.05)
        for mean, factor in zip(apart, (adapter.up_OR, adapter.down_RI), strict=True):
            mean.lerp_(factor, 0.05)
    wrong = adapter.scale * apart[0] @ apart[1]
    assert (wrong - exact).norm() > 0.1 * exact.norm()


def test_a_cut_is_the_nearest_of_its_rank() -> None:
    torch.manual_seed(0)
    up, down = torch.randn(2, 7, 5), torch.randn(2, 5, 9)
    cut = cut_to_rank(up, down, 3)
    left, singular, right = torch.linalg.svd(up @ down, full_matrices=False)
    best = left[..., :3] @ torch.diag_embed(singular[:, :3]) @ right[:, :3]
    torch.testing.assert_close(cut.up_NOR @ cut.down_NRI, best, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cut.lost_N, singular[:, 3:].square().sum(-1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(cut.whole_N, (up @ down).square().sum((1, 2)), rtol=1e-4, atol=1e-3)


def test_it_moves_by_its_share_and_diverged_adapters_are_named() -> None:
    model = make_model()
    LoRA(rank=2).inject(model)
    teacher = twin(model)
    widen(teacher, 8)
    assert float(products_moved(teacher, model)) == 0.0
    assert float(update_products(teacher, model, 0.5)) == 0.0
    for parameter in own_parameters(model):
        parameter.data += 0.1
    update_products(teacher, model, 0.25)
    assert float(products_moved(teacher, model)) == pytest.approx(0.25, rel=1e-4)
    own_parameters(model)[0].data.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        update_products(teacher, model, 0.5)
