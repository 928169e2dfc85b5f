"""The chunked divergence is the whole one, in value and in every gradient, and stays small."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import FAMILIES, IDS, sharpen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sdft.forward_gradient
from sdft.losses import chunked_divergence, sequence_mean, sequence_weights, token_divergence

ALPHAS = [0.0, 0.3, 0.5, 1.0]
N, V, D = 13, 37, 6
EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Inputs(NamedTuple):
    """Student's hidden states, weight, bias; teacher's; the tokens' weights."""

    student: tuple[Tensor, Tensor, Tensor]
    teacher: tuple[Tensor, Tensor, Tensor]
    weights_N: Tensor

    def leaves(self, *wanted: bool) -> tuple[Tensor, ...]:
        return tuple(
            tensor.detach().clone().requires_grad_(want)
            for tensor, want in zip(self.student, wanted or (True,) * 3, strict=True)
        )


def make_inputs(
    seed: int = 0,
    n: int = N,
    vocabulary: tuple[int, int] = (V, V),
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, teacher = (
        tuple(tensor.to(dtype) for tensor in (draw(n, D), draw(v, D), draw(v))) for v in vocabulary
    )
    return Inputs(student, teacher, (draw(n).abs() / max(n, 1)).to(dtype))  # type: ignore[arg-type]


def chunked(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], **options: Any) -> Tensor:
    return chunked_divergence(
        *student[:2],
        *teacher[:2],
        student_bias_V=student[2],
        teacher_bias_V=teacher[2],
        **{"chunk_size": 4} | options,
    )


def plain(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    alpha: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocabulary: int | None = None,
) -> Tensor:
    logits = []
    for hidden_ND, weight_VD, bias_V in (student, teacher):
        whole = (hidden_ND @ weight_VD.t() + bias_V)[:, :vocabulary]
        capped = whole if softcap is None else softcap * torch.tanh(whole / softcap)
        logits.append(capped / temperature)
    return token_divergence(logits[0][None], logits[1][None], alpha)[0]


def gradients(value: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves, retain_graph=True)


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], **near: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **near or EXACT)


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100, None])
def test_it_is_the_whole_divergence(
    alpha: float, temperature: float, chunk_size: int | None
) -> None:
    inputs = make_inputs()
    whole, parts = inputs.leaves(), inputs.leaves()
    expected = plain(whole, inputs.teacher, alpha, temperature)
    options = {"alpha": alpha, "temperature": temperature, "chunk_size": chunk_size}
    found = chunked(parts, inputs.teacher, **options)
    assert found.shape == (N,)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, **EXACT)
    # Uniform upstream, then one of the tokens' own, then weights given beforehand.
    assert_equal(gradients(found.mean(), parts), gradients(expected.mean(), whole))
    weighted = gradients((expected * inputs.weights_N).sum(), whole)
    assert_equal(gradients((found * inputs.weights_N).sum(), parts), weighted)
    before = chunked(parts, inputs.teacher, weights_N=inputs.weights_N, **options)
    torch.testing.assert_close(before, expected * inputs.weights_N, **EXACT)
    assert_equal(gradients(before.sum(), parts), weighted)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_fp32_is_as_exact_as_fp32_can_be(alpha: float, temperature: float) -> None:
    inputs = make_inputs(1, dtype=torch.float32)
    leaves = inputs.leaves()
    double = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    teacher = tuple(tensor.double() for tensor in inputs.teacher)
    found = chunked(leaves, inputs.teacher, alpha=alpha, temperature=temperature)
    expected = plain(double, teacher, alpha, temperature)
    assert found.dtype == torch.float32
    pairs = zip(
        (found, *gradients(found.sum(), leaves)),
        (expected, *gradients(expected.sum(), double)),
        strict=True,
    )
    for one, other in pairs:
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_are_those_of_finite_differences(alpha: float) -> None:
    inputs = make_inputs(2, n=5, vocabulary=(7, 7))

    def function(*student: Tensor, **options: Any) -> Tensor:
        return chunked(student, inputs.teacher, alpha=alpha, temperature=0.8, **options)

    assert torch.autograd.gradcheck(function, inputs.leaves())
    assert torch.autograd.gradcheck(
        lambda *student: function(*student, weights_N=inputs.weights_N, softcap=2.0),
        inputs.leaves(),
    )


def test_equal_distributions_give_zero_and_no_gradient() -> None:
    inputs = make_inputs(3, dtype=torch.float32)
    for alpha in ALPHAS:
        leaves = inputs.leaves()
        found = chunked(leaves, inputs.student, alpha=alpha)
        for tensor in (found, *gradients(found.sum(), leaves)):
            torch.testing.assert_close(tensor, torch.zeros_like(tensor), atol=1e-5, rtol=0)


def test_without_biases() -> None:
    inputs = make_inputs(4)
    hidden, weight, bias = inputs.leaves()
    zeros = torch.zeros_like(bias)
    found = chunked_divergence(hidden, weight, *inputs.teacher[:2], chunk_size=4)
    expected = plain((hidden, weight, zeros), (*inputs.teacher[:2], zeros))
    torch.testing.assert_close(found, expected, **EXACT)
    leaves = (hidden, weight)
    assert_equal(gradients(found.sum(), leaves), gradients(expected.sum(), leaves))


def test_heads_of_different_widths() -> None:
    inputs = make_inputs(5)
    hidden, weight = torch.randn(N, 9, dtype=torch.float64), torch.randn(V, 9, dtype=torch.float64)
    teacher = (hidden, weight, inputs.teacher[2])
    torch.testing.assert_close(
        chunked(inputs.student, teacher), plain(inputs.student, teacher), **EXACT
    )


# ---------------------------------------------------------------- upstream gradients


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each pass over the rows wanted."""
    seen: list[Any] = []
    original = sdft.forward_gradient._swept

    def spy(*args: Any) -> Any:
        seen.append(args[-1])
        return original(*args)

    monkeypatch.setattr(sdft.forward_gradient, "_swept", spy)
    return seen


@pytest.mark.parametrize("reduce", [Tensor.sum, Tensor.mean, lambda value: (3 * value).sum()])
def test_a_uniform_upstream_takes_one_pass(
    reduce: Callable[[Tensor], Tensor], sweeps: list[Any]
) -> None:
    inputs = make_inputs(6)
    reduce(chunked(inputs.leaves(), inputs.teacher, weights_N=inputs.weights_N)).backward()
    assert sweeps == [(True, True, True)]


def test_a_frozen_head_takes_one_pass_whatever_the_upstream(sweeps: list[Any]) -> None:
    inputs = make_inputs(7)
    leaves, whole = inputs.leaves(True, False, False), inputs.leaves(True, False, False)
    upstream = inputs.weights_N
    (chunked(leaves, inputs.teacher) * upstream).sum().backward()
    (plain(whole, inputs.teacher) * upstream).sum().backward()
    torch.testing.assert_close(leaves[0].grad, whole[0].grad, **EXACT)
    assert sweeps == [(True, False, False)]


def test_another_upstream_takes_a_second_pass_for_the_head_alone(sweeps: list[Any]) -> None:
    inputs = make_inputs(8)
    (chunked(inputs.leaves(), inputs.teacher) * inputs.weights_N).sum().backward()
    assert sweeps == [(True, True, True), (False, True, True)]


def test_a_retained_graph_gives_the_same_gradient_twice() -> None:
    inputs = make_inputs(9)
    leaves = inputs.leaves()
    value = chunked(leaves, inputs.teacher).mean()
    first = [gradient.clone() for gradient in gradients(value, leaves)]
    assert_equal(gradients(value, leaves), tuple(first))
    (hidden,) = gradients(value, leaves[:1])
    torch.testing.assert_close(hidden, first[0], **EXACT)


def test_gradients_add_up_in_the_leaves() -> None:
    inputs = make_inputs(10)
    leaves, whole = inputs.leaves(), inputs.leaves()
    for scale in (1.0, -0.5):
        (scale * chunked(leaves, inputs.teacher).sum()).backward()
        (scale * plain(whole, inputs.teacher).sum()).backward()
    for one, other in zip(leaves, whole, strict=True):
        torch.testing.assert_close(one.grad, other.grad, **EXACT)


@pytest.mark.parametrize("upstream", [1.0, torch.ones((), requires_grad=True)])
def test_a_second_derivative_is_refused(upstream: Any) -> None:
    inputs = make_inputs(11)
    leaves = inputs.leaves()
    value = (upstream * chunked(leaves, inputs.teacher)).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, leaves[0], create_graph=True)


@pytest.mark.parametrize(
    "wanted", [(h, w, b) for h in (0, 1) for w in (0, 1) for b in (0, 1) if h or w or b]
)
@pytest.mark.parametrize("uniform", [True, False])
def test_any_choice_of_trained_tensors(wanted: tuple[int, int, int], uniform: bool) -> None:
    inputs = make_inputs(12)
    upstream = torch.full((N,), 0.5, dtype=torch.float64) if uniform else inputs.weights_N
    flags = tuple(map(bool, wanted))
    leaves, whole = inputs.leaves(*flags), inputs.leaves(*flags)
    (chunked(leaves, inputs.teacher) * upstream).sum().backward()
    (plain(whole, inputs.teacher) * upstream).sum().backward()
    for one, other, flag in zip(leaves, whole, flags, strict=True):
        assert (one.grad is not None) == flag
        torch.testing.assert_close(one.grad, other.grad, **EXACT)


def test_the_teacher_gets_no_gradient() -> None:
    inputs = make_inputs(13)
    teacher = tuple(tensor.clone().requires_grad_() for tensor in inputs.teacher)
    assert not chunked(inputs.student, teacher).requires_grad
    chunked(inputs.leaves(), teacher).sum().backward()
    assert all(tensor.grad is None for tensor in teacher)


def test_no_grad_computes_no_gradient(sweeps: list[Any]) -> None:
    inputs = make_inputs(14)
    with torch.no_grad():
        value = chunked(inputs.leaves(), inputs.teacher)
    assert not value.requires_grad
    assert sweeps == [(False, False, False)]
    torch.testing.assert_close(value, plain(inputs.student, inputs.teacher), **EXACT)


# ---------------------------------------------------------------- weights


def test_rows_of_weight_zero_never_show() -> None:
    inputs = make_inputs(15)
    rows = torch.arange(N) % 3 == 1
    weights = inputs.weights_N.masked_fill(rows, 0.0)
    clean, dirty = inputs.leaves(), inputs.leaves()
    with torch.no_grad():
        dirty[0][rows] = math.nan
    teacher = tuple(tensor.clone() for tensor in inputs.teacher)
    teacher[0][rows] = math.inf
    found = chunked(dirty, teacher, weights_N=weights)
    expected = plain(clean, inputs.teacher) * weights
    torch.testing.assert_close(found, expected, **EXACT)
    assert_equal(gradients(found.sum(), dirty), gradients(expected.sum(), clean))
    # The same of an upstream gradient of 0.
    unweighted = chunked(dirty, teacher)[~rows].sum()
    assert_equal(
        gradients(unweighted, dirty), gradients(plain(clean, inputs.teacher)[~rows].sum(), clean)
    )


def test_negative_weights_and_none_at_all() -> None:
    inputs = make_inputs(16)
    leaves, whole = inputs.leaves(), inputs.leaves()
    weights = inputs.weights_N - inputs.weights_N.mean()
    found = chunked(leaves, inputs.teacher, weights_N=weights).sum()
    expected = (plain(whole, inputs.teacher) * weights).sum()
    assert_equal(gradients(found, leaves), gradients(expected, whole))
    nothing = chunked(leaves, inputs.teacher, weights_N=torch.zeros_like(weights))
    assert torch.equal(nothing, torch.zeros_like(weights))
    assert all((gradient == 0).all() for gradient in gradients(nothing.sum(), leaves))


def test_sequence_weights_give_the_mean_over_tokens_then_sequences() -> None:
    mask_BT = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0]]).bool()
    inputs = make_inputs(17, n=12)
    leaves, whole = inputs.leaves(), inputs.leaves()
    weights_N = sequence_weights(mask_BT).flatten()
    found = chunked(leaves, inputs.teacher, weights_N=weights_N).sum()
    expected = sequence_mean(plain(whole, inputs.teacher).view(3, 4), mask_BT)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert_equal(gradients(found, leaves), gradients(expected, whole), rtol=1e-6, atol=1e-8)
    assert torch.equal(sequence_weights(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_an_upstream_of_zero_hides_everything() -> None:
    inputs = make_inputs(28)
    inputs.student[0][3] = math.nan
    leaves = inputs.leaves()
    value = chunked(leaves, inputs.teacher)
    for found in gradients(torch.where(torch.zeros(N).bool(), value, 0.0).sum(), leaves):
        assert (found == 0).all()


@pytest.mark.parametrize("weighted", [True, False])
def test_no_tokens(weighted: bool) -> None:
    inputs = make_inputs(18, n=0)
    leaves = inputs.leaves()
    found = chunked(leaves, inputs.teacher, weights_N=inputs.weights_N if weighted else None)
    assert found.shape == (0,)
    for gradient, leaf in zip(gradients(found.sum(), leaves), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


# ---------------------------------------------------------------- heads as models have them


@pytest.mark.parametrize("alpha", ALPHAS)
def test_soft_capped_logits(alpha: float) -> None:
    inputs = make_inputs(19)
    leaves, whole = inputs.leaves(), inputs.leaves()
    found = chunked(leaves, inputs.teacher, alpha=alpha, temperature=0.7, softcap=1.5)
    expected = plain(whole, inputs.teacher, alpha, 0.7, softcap=1.5)
    torch.testing.assert_close(found, expected, **EXACT)
    for upstream in (torch.ones_like(inputs.weights_N), inputs.weights_N):
        assert_equal(
            gradients((found * upstream).sum(), leaves),
            gradients((expected * upstream).sum(), whole),
        )


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("vocabulary", [(V, V + 5), (V + 5, V), (V + 5, V + 5)])
def test_padded_vocabularies(alpha: float, vocabulary: tuple[int, int]) -> None:
    inputs = make_inputs(20, vocabulary=vocabulary)
    leaves, whole = inputs.leaves(), inputs.leaves()
    options: dict[str, Any] = {"vocab_size": V} if vocabulary[0] == vocabulary[1] else {}
    found = chunked(leaves, inputs.teacher, alpha=alpha, **options)
    expected = plain(whole, inputs.teacher, alpha, vocabulary=V)
    torch.testing.assert_close(found, expected, **EXACT)
    found_gradients = gradients(found.sum(), leaves)
    assert_equal(found_gradients, gradients(expected.sum(), whole))
    assert (found_gradients[1][V:] == 0).all()
    assert (found_gradients[2][V:] == 0).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_bias_rules_tokens_out(alpha: float) -> None:
    inputs = make_inputs(21)
    student, teacher = inputs.leaves(), tuple(tensor.clone() for tensor in inputs.teacher)
    with torch.no_grad():
        student[2][[3, 8]] = -math.inf
        teacher[2][[3, 8]] = -math.inf
        if 0 < alpha < 1:  # one side alone
            teacher[2][11] = -math.inf
            student[2][12] = -math.inf
    found, expected = chunked(student, teacher, alpha=alpha), plain(student, teacher, alpha)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, **EXACT)
    assert_equal(gradients(found.sum(), student), gradients(expected.sum(), student))


def test_mass_where_the_student_has_none_is_infinite() -> None:
    inputs = make_inputs(22)
    inputs.student[2][5] = -math.inf
    assert (chunked(inputs.student, inputs.teacher) == math.inf).all()
    assert chunked(inputs.student, inputs.teacher, alpha=1.0).isfinite().all()


def test_mass_where_the_teacher_has_none() -> None:
    inputs = make_inputs(29)
    inputs.teacher[2][5] = -math.inf
    for alpha in (0.0, 0.5):
        leaves = inputs.leaves()
        found, expected = (
            function(leaves, inputs.teacher, alpha=alpha) for function in (chunked, plain)
        )
        torch.testing.assert_close(found, expected, **EXACT)
        assert_equal(gradients(found.sum(), leaves), gradients(expected.sum(), leaves))
    assert (chunked(inputs.student, inputs.teacher, alpha=1.0) == math.inf).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_probabilities_that_underflow_on_both_sides(alpha: float) -> None:
    inputs = make_inputs(30, dtype=torch.float32)
    for side in (inputs.student, inputs.teacher):
        side[1].mul_(100.0)
    leaves = inputs.leaves()
    found, expected = (
        function(leaves, inputs.teacher, alpha=alpha) for function in (chunked, plain)
    )
    assert (plain(leaves, inputs.teacher).exp() == math.inf).any()  # far apart, they are
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients(found.sum(), leaves))


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # untied and tied
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_models_full_gradient_is_the_plain_paths(family: str, alpha: float) -> None:
    student, teacher = (sharpen(FAMILIES[family](seed)).double() for seed in (0, 1))
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == (family == "qwen2")
    ids = torch.randint(IDS["vocab_size"], (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        teacher_hidden = teacher.model(ids).last_hidden_state.flatten(0, 1)
    expected = token_divergence(student(ids).logits, teacher(ids).logits.detach(), alpha).mean()
    whole = torch.autograd.grad(expected, list(student.parameters()))
    found = chunked_divergence(
        student.model(ids).last_hidden_state.flatten(0, 1),
        student.lm_head.weight,
        teacher_hidden,
        teacher.lm_head.weight,
        alpha=alpha,
        chunk_size=5,
    ).mean()
    torch.testing.assert_close(found, expected, **EXACT)
    parts = torch.autograd.grad(found, list(student.parameters()))
    assert_equal(parts, whole, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_types_are_multiplied_narrow_and_summed_in_fp32(
    hidden_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    inputs = make_inputs(23)
    hidden = inputs.student[0].to(hidden_dtype).requires_grad_()
    weight = inputs.student[1].to(weight_dtype).requires_grad_()
    teacher = (inputs.teacher[0].to(hidden_dtype), inputs.teacher[1].to(weight_dtype))
    found = chunked_divergence(hidden, weight, *teacher, chunk_size=4)
    assert found.dtype == torch.float32
    logits = [h @ w.to(hidden_dtype).t() for h, w in ((hidden, weight), teacher)]
    expected = token_divergence(logits[0][None], logits[1][None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        gradients(found.sum(), (hidden, weight)),
        gradients(expected.sum(), (hidden, weight)),
        strict=True,
    ):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= 0.02 * other.norm()


def test_the_heads_gradient_is_summed_in_fp32_whatever_the_weights_type() -> None:
    n = 4096  # tokens alike: a bf16 sum would stop growing
    hidden = torch.ones(n, D, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=generator).bfloat16().requires_grad_()
    teacher = torch.randn(V, D, generator=generator).bfloat16()
    chunked_divergence(hidden, weight, hidden, teacher, chunk_size=2).sum().backward()
    logits = [(hidden[:1] @ w.t()).double() for w in (weight.detach(), teacher)]
    row = logits[0].softmax(-1) - logits[1].softmax(-1)
    expected = (n * row.t()).expand(V, D)
    assert weight.grad is not None
    assert (weight.grad.double() - expected).norm() <= 0.004 * expected.norm()


def test_fp16_keeps_the_gradients_of_small_weights() -> None:
    inputs = make_inputs(24, dtype=torch.float16)
    hidden, weight, bias = inputs.leaves()
    found = chunked((hidden, weight, bias), inputs.teacher, weights_N=torch.full((N,), 1e-7)).sum()
    large = gradients(found * 2**20, (hidden, weight, bias))  # as a gradient scaler does
    double = tuple(leaf.detach().double().requires_grad_() for leaf in (hidden, weight, bias))
    expected = plain(double, tuple(tensor.double() for tensor in inputs.teacher)).sum() * 1e-7
    for one, other in zip(large, gradients(expected * 2**20, double), strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()


def test_autocast_multiplies_in_its_type_and_computes_in_fp32() -> None:
    inputs = make_inputs(25, dtype=torch.float32)
    leaves = inputs.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked(leaves, inputs.teacher)
        logits = [torch.nn.functional.linear(h, w) + b for h, w, b in (leaves, inputs.teacher)]
        assert logits[0].dtype == torch.float32  # a bf16 product plus an fp32 bias
        expected = token_divergence(logits[0][None], logits[1][None])[0]
        upstream = gradients(found.sum(), leaves)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, plain(leaves, inputs.teacher), rtol=1e-4)
    for one, other in zip(upstream, gradients(expected.sum(), leaves), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.02 * other.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        double = make_inputs(25)
        exact = chunked(double.student, double.teacher)
    torch.testing.assert_close(exact, plain(double.student, double.teacher), **EXACT)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_is_what_it_is_on_the_cpu(dtype: torch.dtype) -> None:
    inputs = make_inputs(26, dtype=dtype)
    leaves = inputs.leaves()
    moved = tuple(leaf.detach().cuda().requires_grad_() for leaf in leaves)
    weights_N = torch.full((N,), 1e-7)  # fp16 products would lose them
    options: dict[str, Any] = {"alpha": 0.5, "weights_N": weights_N}
    expected = chunked(leaves, inputs.teacher, **options) * 2**20
    options["weights_N"] = weights_N.cuda()
    teacher = tuple(tensor.cuda() for tensor in inputs.teacher)
    found = chunked(moved, teacher, **options) * 2**20
    near = 1e-4 if dtype == torch.float32 else 0.02
    pairs = zip(
        (found, *gradients(found.sum(), moved)),
        (expected, *gradients(expected.sum(), leaves)),
        strict=True,
    )
    for one, other in pairs:
        assert (one.cpu() - other).norm() <= near * other.norm()


# ---------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """Entries of the largest storage that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.entries = max(self.entries, stored, tensor.numel())
        return result


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("uniform", [True, False])
def test_no_tensor_of_all_tokens_and_the_whole_vocabulary_ever_exists(
    alpha: float, weighted: bool, uniform: bool
) -> None:
    n, vocabulary, chunk = 512, 300, 16
    inputs = make_inputs(27, n=n, vocabulary=(vocabulary, vocabulary), dtype=torch.float32)
    upstream = torch.ones(n) if uniform else inputs.weights_N
    options = {"alpha": alpha, "softcap": 30.0, "temperature": 0.9, "chunk_size": chunk}
    weights_N = inputs.weights_N if weighted else None
    with Largest() as parts:
        value = chunked(inputs.leaves(), inputs.teacher, weights_N=weights_N, **options)
        (value * upstream).sum().backward()
    with Largest() as whole:
        (plain(inputs.leaves(), inputs.teacher, alpha) * upstream).sum().backward()
    assert whole.entries >= n * vocabulary
    assert parts.entries <= max(chunk * vocabulary, n * D, vocabulary * D)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, found 0"),
        ({"softcap": 0.0}, "softcap must be a finite number above 0, or None, found 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, found 0"),
        ({"vocab_size": V + 1}, f"vocab_size must lie between 1 and {V}.*found {V + 1}"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"weights_N": torch.ones(N + 1)}, rf"weights_N must be \[{N}\], found \[{N + 1}\]"),
        ({"weights_N": torch.ones(N, requires_grad=True)}, "weights_N gets no gradient"),
        ({"student_bias_V": torch.zeros(V - 1)}, rf"student's bias must be \[{V}\]"),
        ({"teacher_bias_V": torch.zeros(V - 1)}, "teacher's bias"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    inputs = make_inputs()
    with pytest.raises(ValueError, match=message):
        chunked_divergence(*inputs.student[:2], *inputs.teacher[:2], **options)


def test_shapes_that_do_not_fit_are_refused() -> None:
    (hidden, weight, _), (other_hidden, other_weight, _), _ = make_inputs()
    with pytest.raises(ValueError, match=r"the student's hidden states and weight.*\[13, 5\]"):
        chunked_divergence(hidden[:, :5], weight, other_hidden, other_weight)
    with pytest.raises(ValueError, match="the teacher's hidden states and weight"):
        chunked_divergence(hidden, weight, other_hidden[None], other_weight)
    with pytest.raises(ValueError, match="differ in tokens: 13 and 12 rows"):
        chunked_divergence(hidden, weight, other_hidden[1:], other_weight)
