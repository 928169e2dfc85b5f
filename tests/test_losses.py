"""Divergences against plain float64 arithmetic, and the means over tokens and sequences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdft.losses import (
    check_alpha,
    sequence_mean,
    token_cross_entropy,
    token_divergence,
    token_entropy,
)

ALPHAS = [0.0, 0.3, 0.5, 1.0]
INF = math.inf


def naive_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) if b > 0 else INF for a, b in zip(p, q, strict=True) if a > 0)


def naive_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    return [weight / sum(weights) for weight in weights]


def naive_divergence(student: list[float], teacher: list[float], alpha: float) -> float:
    q, p = naive_softmax(student), naive_softmax(teacher)
    if alpha == 0:
        return naive_kl(p, q)
    if alpha == 1:
        return naive_kl(q, p)
    m = [(1 - alpha) * b + alpha * a for a, b in zip(p, q, strict=True)]
    return alpha * naive_kl(p, m) + (1 - alpha) * naive_kl(q, m)


def random_logits(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def one_token(logits: list[float]) -> Tensor:
    return torch.tensor([[logits]])


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("alpha", ALPHAS)
def test_values_are_those_of_plain_arithmetic(alpha: float) -> None:
    student, teacher = random_logits(0, 3, 4, 7), random_logits(1, 3, 4, 7)
    found = token_divergence(student, teacher, alpha)
    assert found.shape == (3, 4)
    assert found.dtype == torch.float32
    for b in range(3):
        for t in range(4):
            expected = naive_divergence(student[b, t].tolist(), teacher[b, t].tolist(), alpha)
            assert found[b, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_value_worked_out_by_hand() -> None:
    # Teacher (3/4, 1/4), student (1/2, 1/2).
    student, teacher = one_token([0.0, 0.0]), one_token([math.log(3), 0.0])
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert token_divergence(student, teacher, 0.0).item() == pytest.approx(forward, abs=1e-6)
    assert token_divergence(student, teacher, 1.0).item() == pytest.approx(reverse, abs=1e-6)
    assert token_divergence(student, teacher).item() == pytest.approx(forward, abs=1e-6)


def test_alpha_weighs_the_teacher_in_the_mixture() -> None:
    # Disjoint supports: KL(p‖m) = −log alpha, KL(q‖m) = −log(1 − alpha).
    student, teacher = one_token([0.0, -INF]), one_token([-INF, 0.0])
    expected = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    assert token_divergence(student, teacher, 0.3).item() == pytest.approx(expected, abs=1e-6)
    # Not symmetric away from one half: the two sides do not play the same part.
    student, teacher = random_logits(2, 1, 1, 5), random_logits(3, 1, 1, 5)
    there = token_divergence(student, teacher, 0.1)
    back = token_divergence(teacher, student, 0.1)
    assert not torch.allclose(there, back, rtol=1e-3)


def test_jsd_at_one_half_is_symmetric_and_bounded() -> None:
    student, teacher = random_logits(4, 5, 6, 9), random_logits(5, 5, 6, 9)
    there, back = token_divergence(student, teacher, 0.5), token_divergence(teacher, student, 0.5)
    torch.testing.assert_close(there, back)
    assert there.max() <= math.log(2) + 1e-6


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_distributions_give_zero_and_no_gradient(alpha: float) -> None:
    logits = random_logits(6, 2, 3, 8)
    student = (logits + 5.0).requires_grad_()  # logits are known up to a constant
    value = token_divergence(student, logits, alpha)
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-6, rtol=0)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-6, rtol=0)


LOGITS = st.lists(
    st.floats(-30, 30, allow_nan=False, width=32) | st.just(-INF), min_size=4, max_size=4
).filter(lambda values: max(values) > -INF)


@settings(max_examples=200)
@given(student=LOGITS, teacher=LOGITS, alpha=st.floats(0, 1, allow_nan=False))
def test_never_negative_never_nan_and_never_nan_in_the_gradient(
    student: list[float], teacher: list[float], alpha: float
) -> None:
    leaf = one_token(student).requires_grad_()
    value = token_divergence(leaf, one_token(teacher), alpha)
    assert not value.isnan().any()
    assert value.item() >= -1e-6
    if value.isfinite().all():
        value.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_gradients_are_those_of_finite_differences(alpha: float) -> None:
    student = random_logits(7, 2, 2, 4, dtype=torch.float64).requires_grad_()
    teacher = random_logits(8, 2, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: token_divergence(s, teacher, alpha), (student,))


def test_the_forward_gradient_is_student_minus_teacher() -> None:
    student = random_logits(9, 1, 1, 6).requires_grad_()
    teacher = random_logits(10, 1, 1, 6)
    token_divergence(student, teacher).sum().backward()
    expected = student.detach().softmax(-1) - teacher.softmax(-1)
    torch.testing.assert_close(student.grad, expected)


# ---------------------------------------------------------------- impossible tokens


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_token_that_both_rule_out_changes_nothing(alpha: float) -> None:
    student, teacher = random_logits(11, 2, 3, 5), random_logits(12, 2, 3, 5)
    padding = torch.full((2, 3, 2), -INF)
    wide = torch.cat([student, padding], -1).requires_grad_()
    narrow = student.clone().requires_grad_()
    value = token_divergence(wide, torch.cat([teacher, padding], -1), alpha)
    expected = token_divergence(narrow, teacher, alpha)
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    expected.sum().backward()
    assert wide.grad is not None
    torch.testing.assert_close(wide.grad[..., :5], narrow.grad)
    assert (wide.grad[..., 5:] == 0).all()


def test_mass_where_the_other_side_has_none() -> None:
    certain, open_ = one_token([0.0, -INF]), one_token([0.0, 0.0])
    assert token_divergence(certain, open_, 0.0).item() == INF  # student rules out a teacher token
    assert token_divergence(open_, certain, 0.0).item() == pytest.approx(math.log(2))
    assert token_divergence(open_, certain, 1.0).item() == INF
    assert token_divergence(certain, open_, 1.0).item() == pytest.approx(math.log(2))
    assert math.isfinite(token_divergence(certain, open_, 0.5).item())


def test_a_probability_that_underflows_is_not_nan() -> None:
    # exp(-200) is 0 in fp32: 0 · inf must not become NaN.
    faint, closed = one_token([0.0, -200.0]), one_token([0.0, -INF])
    assert token_divergence(closed, faint, 0.0).item() == 0.0
    leaf = faint.clone().requires_grad_()
    token_divergence(leaf, closed, 1.0).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


# ---------------------------------------------------------------- precision and arguments


@pytest.mark.parametrize("alpha", ALPHAS)
def test_bf16_logits_are_computed_in_fp32(alpha: float) -> None:
    student, teacher = (random_logits(seed, 1, 2, 4096, dtype=torch.bfloat16) for seed in (13, 14))
    found = token_divergence(student, teacher, alpha)
    assert found.dtype == torch.float32
    exact = token_divergence(student.double(), teacher.double(), alpha)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    # The same sum in bf16 is off by far more than this test allows.
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    rounded = (p.exp() * (p - q)).sum(-1)
    if alpha == 0.0:
        assert ((rounded.double() - exact).abs() / exact).max() > 1e-3


def test_fp64_stays_fp64() -> None:
    logits = random_logits(15, 1, 1, 3, dtype=torch.float64)
    assert token_divergence(logits, logits).dtype == torch.float64
    assert token_entropy(logits).dtype == torch.float64


@pytest.mark.parametrize("alpha", [-0.01, 1.01, math.nan, INF, -INF])
def test_an_alpha_outside_its_range_is_refused(alpha: float) -> None:
    logits = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
        token_divergence(logits, logits, alpha)
    with pytest.raises(ValueError, match="alpha"):
        check_alpha(alpha)


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 1, 3), (2, 2, 4), (2, 3)])
def test_shapes_that_differ_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        token_divergence(torch.zeros(2, 2, 3), torch.zeros(shape))


# ---------------------------------------------------------------- means


def test_tokens_are_averaged_within_a_sequence_first() -> None:
    per_token = torch.tensor([[1.0, 3.0, 100.0], [10.0, 100.0, 100.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert sequence_mean(per_token, mask).item() == 6.0  # (2 + 10) / 2, not 14 / 3


def test_a_sequence_without_tokens_does_not_count() -> None:
    per_token = torch.tensor([[2.0, 4.0], [7.0, 7.0]])
    mask = torch.tensor([[True, True], [False, False]])
    assert sequence_mean(per_token, mask).item() == 3.0


@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 3)])
def test_a_batch_without_tokens_gives_zero_and_zero_gradient(shape: tuple[int, int]) -> None:
    per_token = torch.ones(shape, requires_grad=True)
    value = sequence_mean(per_token, torch.zeros(shape, dtype=torch.bool))
    assert value.item() == 0.0
    value.backward()
    assert per_token.grad is not None
    assert (per_token.grad == 0).all()


@pytest.mark.parametrize("hidden", [math.nan, INF])
def test_what_the_mask_hides_never_shows(hidden: float) -> None:
    per_token = torch.tensor([[1.0, hidden], [3.0, 5.0]], requires_grad=True)
    value = sequence_mean(per_token, torch.tensor([[True, False], [True, True]]))
    assert value.item() == 2.5
    value.backward()
    assert torch.equal(per_token.grad, torch.tensor([[0.5, 0.0], [0.25, 0.25]]))


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        sequence_mean(torch.zeros(2, 3), torch.zeros(2, 1))


# ---------------------------------------------------------------- cross-entropy and entropy


def test_cross_entropy_is_the_targets_negative_log_probability() -> None:
    logits = random_logits(16, 2, 3, 5, dtype=torch.bfloat16)
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    found = token_cross_entropy(logits, targets)
    expected = -logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_entropy_of_uniform_certain_and_partly_impossible() -> None:
    logits = torch.tensor([[[0.0] * 4, [0.0, -INF, -INF, -INF], [0.0, 0.0, -INF, -INF]]])
    expected = torch.tensor([[math.log(4), 0.0, math.log(2)]])
    torch.testing.assert_close(token_entropy(logits), expected)
