"""Top-k targets and the divergence from them, against the full vocabulary's."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdft.losses import TopK, token_divergence, topk_divergence, topk_targets

INF = math.inf
VOCABULARY = 7


def random_logits(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


LOGITS = st.lists(
    st.floats(-30, 30, allow_nan=False, width=32) | st.just(-INF),
    min_size=VOCABULARY,
    max_size=VOCABULARY,
).filter(lambda values: max(values) > -INF)


def coarse_kl(student: Tensor, teacher: Tensor, kept: list[int]) -> Tensor:
    """Plain fp64 arithmetic over one distribution's kept tokens and the sum of the others."""
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    value = torch.zeros((), dtype=torch.float64)
    for bucket in [*([token] for token in kept), sorted(set(range(VOCABULARY)) - set(kept))]:
        mass, other = p[bucket].sum(), q[bucket].sum()
        if mass > 0:
            value = value + mass * (mass / other).log()
    return value


# ---------------------------------------------------------------- targets


@settings(max_examples=100)
@given(logits=LOGITS, k=st.integers(1, VOCABULARY + 2))
def test_targets_are_the_likeliest_tokens_and_the_mass_of_the_others(
    logits: list[float], k: int
) -> None:
    exact = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    target = topk_targets(torch.tensor(logits), k)
    kept = min(k, VOCABULARY)
    assert target.ids.dtype == torch.int32
    assert target.log_probs.dtype == target.tail.dtype == torch.float32
    assert target.ids.shape == target.log_probs.shape == (kept,)
    best = exact.sort(descending=True).values
    torch.testing.assert_close(target.log_probs.double(), best[:kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exact[target.ids.long()], best[:kept])
    assert target.ids.unique().numel() == kept
    tail = best[kept:].logsumexp(-1)
    torch.testing.assert_close(target.tail.double(), tail, rtol=1e-5, atol=1e-5)
    if k >= VOCABULARY:
        assert target.tail.item() == -INF


def test_a_faint_tail_does_not_cancel() -> None:
    logits = torch.tensor([40.0, 0.0, 0.0])  # 1 − p(first) is 0 in fp32
    assert topk_targets(logits, 1).tail.item() == pytest.approx(math.log(2) - 40, abs=1e-4)
    student = torch.tensor([[[41.0, 0.0, 0.0]]], requires_grad=True)
    value = topk_divergence(student, topk_targets(logits.expand(1, 1, 3), 1))
    assert value.isfinite().all()


def test_targets_carry_no_gradient_and_keep_fp64() -> None:
    logits = random_logits(0, 2, 3, VOCABULARY, dtype=torch.float64).requires_grad_()
    target = topk_targets(logits, 2)
    assert not target.log_probs.requires_grad
    assert not target.tail.requires_grad
    assert target.log_probs.dtype == target.tail.dtype == torch.float64
    assert topk_targets(logits.bfloat16(), 2).tail.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_temperature_divides_the_logits_of_both_sides(temperature: float) -> None:
    student, teacher = (random_logits(seed, 2, 3, VOCABULARY) for seed in (1, 2))
    found = topk_divergence(student, topk_targets(teacher, 3, temperature), temperature)
    expected = topk_divergence(student / temperature, topk_targets(teacher / temperature, 3))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, topk_divergence(student, topk_targets(teacher, 3)))


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_with_every_token_kept_it_is_the_full_divergence(dtype: torch.dtype) -> None:
    student = random_logits(3, 2, 3, VOCABULARY, dtype=dtype).requires_grad_()
    same = student.detach().clone().requires_grad_()
    teacher = random_logits(4, 2, 3, VOCABULARY, dtype=dtype)
    value = topk_divergence(student, topk_targets(teacher, VOCABULARY))
    expected = token_divergence(same, teacher)
    weights = random_logits(5, 2, 3, dtype=expected.dtype)
    (weights * value).sum().backward()
    (weights * expected).sum().backward()
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(student.grad, same.grad)


@settings(max_examples=200)
@given(student=LOGITS, teacher=LOGITS, k=st.integers(1, VOCABULARY))
def test_the_value_is_the_coarse_divergence_and_never_nan(
    student: list[float], teacher: list[float], k: int
) -> None:
    leaf = torch.tensor([[student]], requires_grad=True)
    target = topk_targets(torch.tensor([[teacher]]), k)
    value = topk_divergence(leaf, target)
    expected = coarse_kl(torch.tensor(student), torch.tensor(teacher), target.ids[0, 0].tolist())
    torch.testing.assert_close(value[0, 0].double(), expected, rtol=1e-4, atol=1e-5)
    if value.isfinite().all():
        value.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@settings(max_examples=100)
@given(student=LOGITS, teacher=LOGITS)
def test_it_grows_with_k_up_to_the_full_divergence(
    student: list[float], teacher: list[float]
) -> None:
    student_logits, teacher_logits = (
        torch.tensor([[values]], dtype=torch.float64) for values in (student, teacher)
    )
    values = [
        topk_divergence(student_logits, topk_targets(teacher_logits, k)).item()
        for k in range(1, VOCABULARY + 1)
    ]
    assert values[0] >= -1e-12
    assert all(a <= b + 1e-12 for a, b in pairwise(values))
    full = token_divergence(student_logits, teacher_logits).item()
    assert values[-1] == pytest.approx(full, abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, VOCABULARY])
def test_the_targets_own_source_gives_zero_and_no_gradient(k: int) -> None:
    logits = random_logits(6, 2, 3, VOCABULARY)
    student = (logits + 5.0).requires_grad_()
    value = topk_divergence(student, topk_targets(logits, k))
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-6, rtol=0)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [1, 3, VOCABULARY])
def test_gradients_are_those_of_finite_differences(k: int) -> None:
    student = random_logits(7, 2, 2, VOCABULARY, dtype=torch.float64).requires_grad_()
    target = topk_targets(random_logits(8, 2, 2, VOCABULARY, dtype=torch.float64), k)
    assert torch.autograd.gradcheck(lambda s: topk_divergence(s, target), (student,))


def test_a_tail_that_only_the_teacher_has_is_infinite_and_one_that_neither_has_is_nothing() -> None:
    open_, closed = torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[1.0, -INF, -INF]]])
    assert topk_divergence(closed, topk_targets(open_, 1)).item() == INF
    student = closed.clone().requires_grad_()
    value = topk_divergence(student, topk_targets(closed, 1))
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(student.grad, torch.zeros_like(closed))


# ---------------------------------------------------------------- arguments


def test_bad_arguments_are_refused() -> None:
    logits = random_logits(9, 2, 3, VOCABULARY)
    with pytest.raises(ValueError, match="k must be at least 1, found 0"):
        topk_targets(logits, 0)
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, found 0"):
        topk_targets(logits, 1, temperature=0.0)
    target = topk_targets(logits, 2)
    with pytest.raises(ValueError, match="temperature"):
        topk_divergence(logits, target, temperature=math.nan)
    for other in (logits[:1], logits[..., :1]):
        with pytest.raises(ValueError, match="do not fit"):
            topk_divergence(other, target)
    with pytest.raises(ValueError, match="do not fit"):
        topk_divergence(logits, TopK(target.ids, target.log_probs, target.tail[..., None]))
