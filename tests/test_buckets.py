"""Divergences of top-k buckets and a tail: against plain arithmetic, and against exact ones."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_method, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chunked import Largest, assert_equal, chunked, gradients, make_inputs, plain
from test_module import WholeLogits, batch_of
from torch import Tensor

from sdft import SDFTModule
from sdft.buckets import bucket_divergence_
from sdft.losses import bucket_divergence, chunked_divergence, token_divergence

VOCABULARY = 7
ALPHAS = [0.0, 0.3, 1.0]
LOGITS = st.lists(
    st.floats(-30, 30, allow_nan=False, width=32) | st.just(-math.inf),
    min_size=VOCABULARY,
    max_size=VOCABULARY,
).filter(lambda values: max(values) > -math.inf)


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_hand(student: Tensor, teacher: Tensor, kept: list[int], alpha: float) -> Tensor:
    """Of one distribution each, in plain fp64 arithmetic over the buckets."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    others = sorted(set(range(len(q))) - set(kept))
    buckets = [*([token] for token in kept), *([others] if others else [])]
    q = torch.stack([q[bucket].sum() for bucket in buckets])
    p = torch.stack([p[bucket].sum() for bucket in buckets])
    m = (1 - alpha) * q + alpha * p
    if alpha == 0:
        return (p * (p / q).log()).sum()
    if alpha == 1:
        return (q * (q / p).log()).sum()
    return alpha * (p * (p / m).log()).sum() + (1 - alpha) * (q * (q / m).log()).sum()


@pytest.mark.parametrize("k", [1, 2, 6, 7, 9])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_support_is_that_of_the_side_whose_mass_weighs(alpha: float, k: int) -> None:
    student, teacher = draw(0, 1, 5, VOCABULARY), draw(1, 1, 5, VOCABULARY)
    p, q = teacher.softmax(-1), student.softmax(-1)
    by = {0.0: p, 1.0: q}.get(alpha, p + q)
    assert not torch.equal(p.argmax(-1), q.argmax(-1)), "else the sides would not differ"
    found = bucket_divergence(student, teacher, k, alpha)
    for place in range(5):
        kept = by[0, place].argsort(descending=True)[:k].tolist()
        expected = by_hand(student[0, place], teacher[0, place], kept, alpha)
        torch.testing.assert_close(found[0, place], expected)


@settings(max_examples=150)
@given(student=LOGITS, teacher=LOGITS, alpha=st.sampled_from(ALPHAS), k=st.integers(1, 9))
def test_never_above_the_exact_divergence(
    student: list[float], teacher: list[float], alpha: float, k: int
) -> None:
    own = torch.tensor(student, dtype=torch.float64)[None, None]
    other = torch.tensor(teacher, dtype=torch.float64)[None, None]
    exact = token_divergence(own, other, alpha)
    found = bucket_divergence(own, other, k, alpha)
    assert found >= -1e-12
    assert found <= exact + 1e-9 * exact.abs() + 1e-12
    if k >= VOCABULARY:
        torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_it_grows_with_k_to_the_exact_one(alpha: float) -> None:
    student, teacher = draw(2, 4, 6, VOCABULARY), draw(3, 4, 6, VOCABULARY)
    values = [bucket_divergence(student, teacher, k, alpha) for k in range(1, VOCABULARY + 1)]
    assert all((more >= less - 1e-12).all() for less, more in pairwise(values))
    assert (values[1] < values[-1]).any()
    torch.testing.assert_close(values[-1], token_divergence(student, teacher, alpha))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradient_in_closed_form(alpha: float, k: int, masked: bool) -> None:
    student, teacher = draw(4, 3, 5, VOCABULARY), draw(5, 3, 5, VOCABULARY)
    if masked:  # more tokens ruled out than a tail has: it is empty in places
        student[..., :3] = teacher[..., :3] = -math.inf
    student.requires_grad_()
    expected = bucket_divergence(student, teacher, k, alpha)
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    gradient = student.detach().log_softmax(-1)
    found = bucket_divergence_(gradient, teacher.log_softmax(-1), alpha, k)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("k", [1, 5, 36])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 5.0}], ids=str)
def test_chunks_of_hidden_states_give_the_same(
    alpha: float, k: int, options: dict[str, float]
) -> None:
    inputs = make_inputs(vocabulary=(37, 39))
    whole, parts = inputs.leaves(), inputs.leaves()
    found = chunked(parts, inputs.teacher, alpha=alpha, top_k=k, **options)
    temperature, cap = options.get("temperature", 1.0), options.get("softcap")
    logits = []
    for hidden_ND, weight_VD, bias_V in (whole, inputs.teacher):
        own = hidden_ND @ weight_VD[:37].t() + bias_V[:37]
        logits.append((cap * torch.tanh(own / cap) if cap else own) / temperature)
    expected = bucket_divergence(logits[0][None], logits[1][None], k, alpha)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert_equal(gradients(found.sum(), parts), gradients(expected.sum(), whole))
    weighted = chunked(
        parts, inputs.teacher, alpha=alpha, top_k=k, weights_N=inputs.weights_N, **options
    )
    expected = gradients((expected * inputs.weights_N).sum(), whole)
    assert_equal(gradients(weighted.sum(), parts), expected)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_with_all_tokens_the_chunks_are_exact(alpha: float) -> None:
    inputs = make_inputs()
    found = chunked(inputs.student, inputs.teacher, alpha=alpha, top_k=37)
    assert torch.equal(found, chunked(inputs.student, inputs.teacher, alpha=alpha))
    torch.testing.assert_close(found, plain(inputs.student, inputs.teacher, alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_no_tensor_of_all_tokens_and_the_whole_vocabulary(alpha: float) -> None:
    tokens, vocabulary, rows = 64, 500, 4
    inputs = make_inputs(n=tokens, vocabulary=(vocabulary, vocabulary), dtype=torch.float32)
    (student, *_), (teacher, *_) = inputs.leaves(True, False, False), inputs.teacher
    weights = inputs.student[1], inputs.teacher[1]
    with Largest() as largest:
        found = chunked_divergence(
            student, weights[0], teacher, weights[1], alpha=alpha, top_k=8, chunk_size=rows
        )
        found.sum().backward()
    assert largest.entries <= max(vocabulary * 6, rows * vocabulary)


def test_a_k_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match="top k must be at least 1"):
        bucket_divergence(draw(0, 1, 1, 3), draw(1, 1, 1, 3), 0)
    inputs = make_inputs()
    with pytest.raises(ValueError, match="top k must be at least 1"):
        chunked(inputs.student, inputs.teacher, top_k=0)


# ---------------------------------------------------------------- as the method's loss


@pytest.mark.parametrize("alpha", ALPHAS)
def test_hidden_states_and_whole_logits_give_one_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: float
) -> None:
    monkeypatch.setattr(SDFTModule, "_log_step", lambda *args: None)
    folder = save_model(tmp_path)
    found: list[tuple[float, list[Any]]] = []
    for kind, k in ((SDFTModule, 3), (WholeLogits, 3), (SDFTModule, None), (SDFTModule, 17)):
        module = make_method(
            kind, folder, alpha=alpha, temperature=0.7, skip_first_tokens=1, divergence_top_k=k
        )
        module.configure_model()
        assert module.teacher is not None
        with torch.no_grad():
            for parameter in module.teacher.parameters():
                parameter.mul_(1.5)  # so that the two differ
        torch.manual_seed(0)
        loss = module.training_step(batch_of(module, count=5), 0)
        loss.backward()
        found.append((loss.item(), [p.grad for p in module.model.parameters()]))
    (hidden, ours), (whole, theirs), (exact, _), (all_tokens, _) = found
    assert hidden == pytest.approx(whole, rel=1e-4)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-6)
    assert 0 < hidden < 0.99 * exact
    assert all_tokens == exact
