"""Cross-entropy and top-k divergence in chunks are the whole ones, in value and every gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import sharpen
from test_chunked import (
    EXACT,
    D,
    Inputs,
    Largest,
    N,
    V,
    assert_equal,
    gradients,
    make_inputs,
)
from test_head import HEADS
from torch import Tensor

import sdft.forward_gradient
from sdft.head import head
from sdft.head_losses import (
    head_cross_entropy,
    head_topk_divergence,
    head_topk_targets,
)
from sdft.losses import (
    TopK,
    chunked_cross_entropy,
    chunked_topk_divergence,
    token_cross_entropy,
    topk_divergence,
    topk_targets,
)

Loss = Callable[..., Tensor]
TARGETS = torch.arange(N) * 5 % V


def logits_of(leaves: tuple[Tensor, ...], softcap: float | None = None) -> Tensor:
    whole = leaves[0] @ leaves[1].t() + leaves[2]
    return whole if softcap is None else softcap * torch.tanh(whole / softcap)


def soft(inputs: Inputs, k: int, temperature: float = 1.0) -> TopK:
    return topk_targets(logits_of(inputs.teacher), k, temperature)


def whole_cross_entropy(logits_NV: Tensor, targets_N: Tensor, dft: bool) -> Tensor:
    nll_N = token_cross_entropy(logits_NV[None], targets_N[None])[0]
    return nll_N.detach().neg().exp() * nll_N if dft else nll_N


def losses(kind: str, inputs: Inputs, softcap: float | None = None) -> tuple[Loss, Loss]:
    """A loss in chunks and of whole logits, each a function of the student's three tensors."""
    if kind.startswith("top"):
        target = soft(inputs, int(kind[3:]), 0.7)
        return (
            lambda hidden, weight, bias, **options: chunked_topk_divergence(
                hidden,
                weight,
                target,
                **{"bias_V": bias, "softcap": softcap, "temperature": 0.7, "chunk_size": 4}
                | options,
            ),
            lambda *leaves: topk_divergence(logits_of(leaves, softcap), target, 0.7),
        )
    dft = kind == "dft"
    targets = torch.arange(len(inputs.weights_N)) * 5 % len(inputs.student[1])
    return (
        lambda hidden, weight, bias, **options: chunked_cross_entropy(
            hidden,
            weight,
            targets,
            **{"bias_V": bias, "softcap": softcap, "times_probability": dft, "chunk_size": 4}
            | options,
        ),
        lambda *leaves: whole_cross_entropy(logits_of(leaves, softcap), targets, dft),
    )


KINDS = ["sft", "dft", "top1", "top5", f"top{V}"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk_size", [1, 4, 100, None])
def test_it_is_the_loss_of_whole_logits(
    kind: str, softcap: float | None, chunk_size: int | None
) -> None:
    inputs = make_inputs()
    parts, whole = inputs.leaves(), inputs.leaves()
    chunked, plain = losses(kind, inputs, softcap)
    found, expected = chunked(*parts, chunk_size=chunk_size), plain(*whole)
    assert found.shape == (N,)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, **EXACT)
    # Uniform upstream, then one of the tokens' own, then weights given beforehand.
    assert_equal(gradients(found.mean(), parts), gradients(expected.mean(), whole))
    weighted = gradients((expected * inputs.weights_N).sum(), whole)
    assert_equal(gradients((found * inputs.weights_N).sum(), parts), weighted)
    before = chunked(*parts, chunk_size=chunk_size, weights_N=inputs.weights_N)
    torch.testing.assert_close(before, expected * inputs.weights_N, **EXACT)
    assert_equal(gradients(before.sum(), parts), weighted)


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_as_exact_as_fp32_can_be(kind: str) -> None:
    inputs = make_inputs(1, dtype=torch.float32)
    double = Inputs(*(tuple(t.double() for t in part) for part in inputs[:2]), inputs.weights_N)
    leaves = inputs.leaves()
    whole = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    found = losses(kind, inputs)[0](*leaves)
    expected = losses(kind, double)[1](*whole)
    assert found.dtype == torch.float32
    results = (found, *gradients(found.sum(), leaves))
    for one, other in zip(results, (expected, *gradients(expected.sum(), whole)), strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("kind", ["sft", "top1", "top3", "top7"])
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    inputs = make_inputs(2, n=5, vocabulary=(7, 7))
    chunked, _ = losses(kind, inputs, softcap=2.0)
    assert torch.autograd.gradcheck(
        lambda *leaves: chunked(*leaves, weights_N=inputs.weights_N), inputs.leaves()
    )


def test_no_gradient_passes_through_the_probability() -> None:
    inputs = make_inputs(3)
    (hidden,) = inputs.leaves(True, False, False)[:1]
    found = chunked_cross_entropy(hidden, inputs.student[1], TARGETS, times_probability=True)
    p = (hidden @ inputs.student[1].t()).softmax(-1).gather(-1, TARGETS[:, None]).sum()
    minus_p = gradients(-p, (hidden,))
    assert_equal(gradients(found.sum(), (hidden,)), minus_p)


@pytest.mark.parametrize("kind", ["sft", "top5"])
def test_a_uniform_upstream_takes_one_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = sdft.forward_gradient._swept
    monkeypatch.setattr(
        sdft.forward_gradient, "_swept", lambda *a: seen.append(a[-1]) or original(*a)
    )
    inputs = make_inputs(4)
    losses(kind, inputs)[0](*inputs.leaves(), weights_N=inputs.weights_N).sum().backward()
    assert seen == [(True, True, True)]


@pytest.mark.parametrize("kind", ["sft", "dft", "top5"])
def test_rows_of_weight_zero_never_show(kind: str) -> None:
    inputs = make_inputs(5)
    rows = torch.arange(N) % 3 == 1
    weights = inputs.weights_N.masked_fill(rows, 0.0)
    clean, dirty = inputs.leaves(), inputs.leaves()
    with torch.no_grad():
        dirty[0][rows] = math.nan
    chunked, plain = losses(kind, inputs)
    found, expected = chunked(*dirty, weights_N=weights), plain(*clean) * weights
    torch.testing.assert_close(found, expected, **EXACT)
    assert_equal(gradients(found.sum(), dirty), gradients(expected.sum(), clean))


@pytest.mark.parametrize("kind", ["sft", "dft", "top5"])
def test_no_tokens(kind: str) -> None:
    inputs = make_inputs(6, n=0)
    leaves = inputs.leaves()
    found = losses(kind, inputs)[0](*leaves)
    assert found.shape == (0,)
    for gradient, leaf in zip(gradients(found.sum(), leaves), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_a_hopeless_token_has_neither_weighted_loss_nor_gradient() -> None:
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    targets = torch.tensor([1, 1])
    found = chunked_cross_entropy(hidden, weight, targets, times_probability=True)
    found.sum().backward()
    assert found.tolist() == [0.0, 0.0]
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()
    ruled_out = chunked_cross_entropy(
        hidden, weight, targets, times_probability=True, bias_V=torch.tensor([0.0, -math.inf])
    )
    assert ruled_out.tolist() == [0.0, 0.0]


def test_a_sure_token_keeps_its_small_loss() -> None:
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[12.0], [0.0]])
    value = chunked_cross_entropy(hidden, weight, torch.tensor([0]))
    value.backward()
    exact = math.log1p(math.exp(-12.0))
    assert value.item() == pytest.approx(exact, rel=1e-6, abs=1e-7)
    assert hidden.grad.item() == pytest.approx(-12.0 / (1 + math.exp(12.0)), rel=0.02)


@pytest.mark.parametrize("far", [0.0, 150.0])
def test_faint_tails_on_either_side(far: float) -> None:
    """A student's tail of e^−150 is nothing in fp32; its tokens still share the tail's gradient."""
    teacher = torch.tensor([[3.0, 1.0, 0.0, -1.0]])
    weight = torch.tensor([[far], [0.0], [-1.0], [-2.0]])
    target = topk_targets(teacher, 1)
    one, other = (torch.ones(1, 1, requires_grad=True) for _ in range(2))
    found = chunked_topk_divergence(one, weight, target)
    expected = topk_divergence(other @ weight.t(), target)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_a_tail_that_the_student_rules_out() -> None:
    target = topk_targets(torch.tensor([[1.0, 0.0, 0.0], [1.0, -math.inf, -math.inf]]), 1)
    bias = torch.tensor([0.0, -math.inf, -math.inf])
    hidden = torch.ones(2, 1, requires_grad=True)
    found = chunked_topk_divergence(hidden, torch.ones(3, 1), target, bias_V=bias)
    assert found.tolist() == [math.inf, 0.0]
    found[1].backward()
    assert torch.equal(hidden.grad, torch.zeros(2, 1))


def test_an_infinite_value_has_the_gradient_of_what_can_move() -> None:
    target = topk_targets(torch.tensor([[1.0, 0.5, 0.0]]), 2)
    weight, bias = torch.tensor([[1.0], [-2.0], [0.5]]), torch.tensor([0.0, 0.0, -math.inf])
    one, other = (torch.ones(1, 1, requires_grad=True) for _ in range(2))
    found = chunked_topk_divergence(one, weight, target, bias_V=bias)
    expected = topk_divergence(other @ weight.t() + bias, target)
    assert found.item() == expected.item() == math.inf
    torch.testing.assert_close(gradients(found, (one,)), gradients(expected, (other,)))


def test_targets_of_no_mass_add_nothing() -> None:
    inputs = make_inputs(7)
    ids, log_probs, tail = soft(inputs, 3)
    log_probs[2], tail[2] = -math.inf, -math.inf  # as padding has them
    leaves = inputs.leaves()
    found = chunked_topk_divergence(*leaves[:2], TopK(ids, log_probs, tail), chunk_size=4)
    assert found[2] == 0
    assert (gradients(found.sum(), leaves[:1])[0][2] == 0).all()


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", ["sft", "dft", "top5"])
@pytest.mark.parametrize("uniform", [True, False])
def test_no_tensor_of_all_tokens_and_the_whole_vocabulary_ever_exists(
    kind: str, uniform: bool
) -> None:
    n, vocabulary, chunk = 512, 300, 16
    inputs = make_inputs(8, n=n, vocabulary=(vocabulary, vocabulary), dtype=torch.float32)
    upstream = torch.ones(n) if uniform else inputs.weights_N
    run, plain = losses(kind, inputs, softcap=30.0)
    with Largest() as parts:
        (run(*inputs.leaves(), chunk_size=chunk) * upstream).sum().backward()
    with Largest() as whole:
        (plain(*inputs.leaves()) * upstream).sum().backward()
    assert whole.entries >= n * vocabulary
    assert parts.entries <= max(chunk * vocabulary, n * D, vocabulary * D)


# ---------------------------------------------------------------- heads as models have them


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_losses_behind_the_heads_of_models(name: str, dtype: torch.dtype, near: float) -> None:
    """Tied and untied, with bias, scale and cap: what the model's own logits give."""
    model = sharpen(HEADS[name]()).to(dtype)
    parts = head(model)
    assert parts is not None
    hidden = model.base_model(torch.tensor([[3, 9, 12, 5, 4, 10, 11]])).last_hidden_state[0]
    hidden = hidden.detach()
    targets_N = torch.tensor([9, 12, 5, 4, 10, 11, 1])
    weights_N = torch.rand(7, dtype=dtype)
    soft_N = head_topk_targets(hidden.flip(0), parts, 4, 1.3)
    expected_soft = topk_targets(parts.logits(hidden.flip(0)), 4, 1.3)
    for one, other in zip(soft_N, expected_soft, strict=True):
        torch.testing.assert_close(one, other)
    cases: list[tuple[Loss, Loss]] = [
        (
            lambda h: head_cross_entropy(h, parts, targets_N, weights_N=weights_N),
            lambda z: whole_cross_entropy(z, targets_N, False),
        ),
        (
            lambda h: head_cross_entropy(
                h, parts, targets_N, times_probability=True, weights_N=weights_N
            ),
            lambda z: whole_cross_entropy(z, targets_N, True),
        ),
        (
            lambda h: head_topk_divergence(h, parts, soft_N, temperature=1.3, weights_N=weights_N),
            lambda z: topk_divergence(z, soft_N, 1.3),
        ),
    ]
    for chunked, plain in cases:
        leaves = (hidden.clone().requires_grad_(), parts.weight_VD)
        found = chunked(leaves[0]).sum()
        expected = (plain(parts.logits(leaves[0])) * weights_N).sum()
        torch.testing.assert_close(found, expected, rtol=near, atol=near)
        for one, other in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
            assert (one - other).norm() <= near * (1 + other.norm())


# ---------------------------------------------------------------- arguments


def test_bad_arguments_are_refused() -> None:
    inputs = make_inputs(9)
    hidden, weight, _ = inputs.student
    with pytest.raises(ValueError, match=r"targets_N must be \[13\], found \[12\]"):
        chunked_cross_entropy(hidden, weight, TARGETS[1:])
    with pytest.raises(ValueError, match="softcap must be"):
        chunked_cross_entropy(hidden, weight, TARGETS, softcap=0.0)
    with pytest.raises(ValueError, match=r"weights_N must be \[13\]"):
        chunked_cross_entropy(hidden, weight, TARGETS, weights_N=torch.ones(3))
    with pytest.raises(ValueError, match="temperature must be"):
        chunked_topk_divergence(hidden, weight, soft(inputs, 2), temperature=0.0)
    with pytest.raises(ValueError, match="do not fit"):
        chunked_topk_divergence(hidden[1:], weight, soft(inputs, 2))
    leaf = hidden.clone().requires_grad_()
    value = chunked_cross_entropy(leaf, weight, TARGETS).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, leaf, create_graph=True)
