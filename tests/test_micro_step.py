"""An update in micro-batches is the undivided one, and holds one micro-batch's activations."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    FAMILIES,
    make_data,
    make_method,
    make_model,
    make_module,
    make_tokenizer,
    save_model,
    sharpen,
)
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from test_module import WholeLogits, batch_of
from torch import Tensor, distributed, multiprocessing, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sdft import SDFTModule
from sdft.micro_step import check_micro_batches, divide, summed
from sdft.rollout import Rollout

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SDFTModule, "_log_step", lambda *args: None)


def build(folder: Path, **options: Any) -> SDFTModule:
    module = make_method(SDFTModule, folder, **{"skip_first_tokens": 1} | options)
    module.configure_model()
    assert module.teacher is not None
    with torch.no_grad():
        for parameter in module.teacher.parameters():
            parameter.mul_(1.5)  # so that the two differ
    return module


def step(module: SDFTModule, count: int = 6) -> tuple[float, dict[str, Tensor | None]]:
    torch.manual_seed(0)
    loss = module.training_step(batch_of(module, count), 0)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), {name: p.grad for name, p in module.model.named_parameters()}


def assert_near(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, gradient in expected.items():
        own = found[name]
        if gradient is None:
            assert own is None, name
        else:
            assert own is not None, name
            assert (own - gradient).norm() <= 1e-6 * max(float(gradient.norm()), 1e-2), name
    assert any(g is not None and g.norm() > 1e-3 for g in expected.values())


# ---------------------------------------------------------------- the same gradient


@pytest.mark.parametrize("budget", [1, 30, 45, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_undivided_step(
    tmp_path: Path, silent: None, family: str, budget: int
) -> None:
    folder = save_model(tmp_path, family=family)
    results = []
    for tokens in (None, budget):
        module = build(folder, micro_batch_tokens=tokens, alpha=0.3, temperature=0.8)
        module.model.eval()  # GPT-2 has dropout
        results.append(step(module))
    (whole, expected), (found, gradients) = results
    assert whole > 0
    assert found == pytest.approx(whole, rel=1e-6)
    assert_near(gradients, expected)


@pytest.mark.parametrize("divergence_top_k", [None, 3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_computed_again_and_frozen_parameters(
    tmp_path: Path, silent: None, reentrant: bool, divergence_top_k: int | None
) -> None:
    folder = save_model(tmp_path)
    results = []
    for tokens, again in ((None, False), (30, True)):
        module = build(folder, micro_batch_tokens=tokens, divergence_top_k=divergence_top_k)
        module.model.get_input_embeddings().requires_grad_(reentrant)
        module.model.model.layers[0].mlp.requires_grad_(False)
        if again:
            kwargs = {"use_reentrant": reentrant}
            module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        results.append(step(module))
    (_, expected), (_, gradients) = results
    assert gradients["model.layers.0.mlp.up_proj.weight"] is None
    assert_near(gradients, expected)


def test_under_autocast(model_dir: Path, silent: None) -> None:
    results = []
    for tokens in (None, 30):
        module = build(model_dir, micro_batch_tokens=tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            torch.manual_seed(0)
            loss = module.training_step(batch_of(module, 6), 0)
        loss.backward()  # type: ignore[no-untyped-call]
        results.append({name: p.grad for name, p in module.model.named_parameters()})
    for name, expected in results[0].items():
        own = results[1][name]
        assert own is not None
        assert expected is not None
        assert own.dtype == torch.float32
        assert (own - expected).norm() <= 3e-2 * expected.norm() + 1e-5, name


def test_rows_of_a_batch_of_skipped_tokens_have_a_gradient_of_zero(
    model_dir: Path, silent: None
) -> None:
    loss, gradients = step(build(model_dir, skip_first_tokens=50, micro_batch_tokens=1))
    assert loss == 0.0
    assert all(g is None or not g.any() for g in gradients.values())


def test_a_whole_run_with_accumulation_and_clipping(fit: Fit, tmp_path: Path) -> None:
    sharpen(make_model(), 4.0).save_pretrained(folder := tmp_path / "sharp")
    make_tokenizer().save_pretrained(folder)
    trained = []
    for tokens in (None, 20):
        module = make_module(
            folder,
            micro_batch_tokens=tokens,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        )
        options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.004}
        trained.append(fit(module=module, data=make_data(("only",)), **options)[1])
    one, other = (dict(module.model.named_parameters()) for module in trained)
    start = dict(make_module(folder).model.named_parameters())
    moved = torch.stack([(one[name] - start[name]).norm() for name in one]).norm()
    assert moved > 0.001
    apart = torch.stack([(one[name] - other[name]).norm() for name in one]).norm()
    assert apart < 1e-4 * moved


# ---------------------------------------------------------------- one micro-batch at a time


class Activations:
    """Bytes that the backward passes still need, at their most; weights are not counted."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.held = self.peak = 0

    def pack(self, tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() in self.weights:
            return tensor
        return _Held(self, tensor)

    def unpack(self, held: Any) -> Tensor:
        tensor: Tensor = held.tensor if isinstance(held, _Held) else held
        return tensor


class _Held:
    def __init__(self, owner: Activations, tensor: Tensor) -> None:
        self.owner, self.tensor = owner, tensor
        owner.held += tensor.nbytes
        owner.peak = max(owner.peak, owner.held)

    def __del__(self) -> None:
        self.owner.held -= self.tensor.nbytes


def test_activations_of_one_micro_batch_exist_at_a_time(
    model_dir: Path, silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks, passes = {}, {}
    for tokens in (None, 60):
        module = build(model_dir, micro_batch_tokens=tokens)
        seen: list[tuple[bool, int]] = []
        real = SDFTModule.hidden

        def spy(self: Any, model: Any, prompts: Any, completion: Rollout) -> Tensor:
            total = sum(map(len, prompts)) + int(completion.lengths_B.sum())
            seen.append((model is self.student, total))  # noqa: B023
            return real(self, model, prompts, completion)  # noqa: B023

        monkeypatch.setattr(SDFTModule, "hidden", spy)
        held = Activations(module.model)
        with saved_tensors_hooks(held.pack, held.unpack):
            step(module, count=24)
        monkeypatch.setattr(SDFTModule, "hidden", real)
        peaks[tokens], passes[tokens] = held.peak, seen
    assert len(passes[None]) == 2
    assert all(total <= 60 for _, total in passes[60])
    for learns in (False, True):  # the teacher and the student are divided
        found = [[n for student, n in passes[t] if student == learns] for t in (None, 60)]
        assert sum(found[1]) == found[0][0] > 4 * 60
    assert peaks[60] < 0.35 * peaks[None]


def test_phases_and_counts_are_those_of_the_undivided_step(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, silent: None
) -> None:
    begun: list[list[str]] = []
    counts: list[dict[str, tuple[int, int]]] = []
    for tokens in (None, 30):
        module = build(model_dir, micro_batch_tokens=tokens)
        begun.append([])
        module.phases.listener = begun[-1].append
        step(module)
        module.phases.enter("")
        phases = module.phases.lap().phases
        counts.append({name: (cost.tokens, cost.flops) for name, cost in phases.items()})
    assert begun[0] == begun[1] == ["generate", "score", "update", "track", "update", ""]
    assert counts[0] == counts[1]


# ---------------------------------------------------------------- dividing


def test_tokens_find_their_places() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()
    completion = Rollout(torch.arange(12).view(4, 3), mask, torch.zeros(4).bool())
    prompts = [[7] * n for n in (2, 3, 4, 1)]
    parts = divide(prompts, completion, 7)
    assert sorted(row for part in parts for row in part.rows) == [0, 1, 2, 3]
    assert len(parts) == 3
    ids_N = completion.ids_BT[mask]
    for part in parts:
        assert sum(len(prompts[row]) + int(mask[row].sum()) for row in part.rows) <= 7
        own = completion.rows(part.rows).trimmed()
        assert torch.equal(own.ids_BT[own.mask_BT], ids_N[part.places])
    (whole,) = divide(prompts, completion, None)
    assert whole.rows == [0, 1, 2, 3]
    assert whole.places.tolist() == list(range(8))
    assert len(divide(prompts, completion, 1)) == 4, "a row over the budget stands alone"
    assert len(divide(prompts, completion, 8, padded=True)) == 3


# ---------------------------------------------------------------- the function itself


def tiny() -> tuple[nn.Module, list[Callable[[], Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight  # tied
    model[2].bias.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    inputs = torch.randn(3, 5, 4)
    return model, [partial(lambda x: model[:3](x).square().sum(), x) for x in inputs]


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_sum_and_its_gradient(scale: float) -> None:
    model, parts = tiny()
    expected = torch.stack([part() for part in parts]).sum()
    (2.5 * expected).backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    hooked: list[int] = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: hooked.append(1))
    before = list(model.parameters())
    loss = summed(parts, model, scale)
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]
    assert all(p.grad is None for p in model.parameters())
    assert not hooked, "nothing has arrived at the parameters yet"
    (2.5 * loss).backward()
    torch.testing.assert_close(loss, expected.detach())
    assert hooked == [1]
    for name, parameter in model.named_parameters():
        if wanted[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, wanted[name])
    assert model.unused.grad is None


def test_gradients_join_those_that_are_there() -> None:
    model, parts = tiny()
    summed(parts[:1], model).backward()
    summed(parts[1:], model).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    found = {name: None if g is None else g.clone() for name, g in found.items()}
    torch.stack([part() for part in parts]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad)


def test_no_second_copy_of_the_gradients_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    model, parts = tiny()
    loss = summed(parts, model)
    buffers = [g.data_ptr() for g in loss.grad_fn.gradients if g is not None]  # type: ignore[union-attr]
    loss.backward()
    assert [p.grad.data_ptr() for p in model.parameters() if p.grad is not None] == buffers
    with pytest.raises(RuntimeError, match="handed out once"):
        loss.backward()


def test_a_failing_part_leaves_the_parameters_in_their_places() -> None:
    model, parts = tiny()
    before = list(model.parameters())

    def fails() -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        summed([*parts, fails], model)
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]
    assert model[0].weight is model[1].weight


def test_without_gradients_it_is_a_sum() -> None:
    model, parts = tiny()
    with torch.no_grad():
        assert summed(parts, model).item() == pytest.approx(sum(part().item() for part in parts))


def test_reentrant_recomputation_sees_the_stand_ins() -> None:
    model, parts = tiny()
    torch.stack([part() for part in parts]).sum().backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad()
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    tiny()  # draws the same inputs
    again = [
        partial(
            lambda part: checkpoint(lambda _: part(), inputs.requires_grad_(), use_reentrant=True),
            part,
        )
        for part in parts
    ]
    summed(again, model).backward()
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient)


# ---------------------------------------------------------------- what cannot be divided


def test_sharded_parameters_and_whole_logits_are_refused() -> None:
    check_micro_batches(SingleDeviceStrategy(), "SDFTModule", True)
    with pytest.raises(ValueError, match=r"micro_batch_tokens needs whole.*found.*FSDP"):
        check_micro_batches(FSDPStrategy(), "SDFTModule", True)
    with pytest.raises(ValueError, match=r"micro_batch_tokens divides.*Mine takes its loss from"):
        check_micro_batches(SingleDeviceStrategy(), "Mine", False)


def test_a_loss_over_whole_logits_is_refused_before_training(fit: Fit, model_dir: Path) -> None:
    module = make_method(WholeLogits, model_dir, micro_batch_tokens=30)
    with pytest.raises(ValueError, match="takes its loss from whole logits"):
        fit(module=module)


def test_a_budget_below_1_is_refused(model_dir: Path) -> None:
    with pytest.raises(ValueError, match="micro_batch_tokens must be at least 1, found 0"):
        make_module(model_dir, micro_batch_tokens=0)


# ---------------------------------------------------------------- several processes


def _in_one_of_two(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = sharpen(make_model())
    inputs = torch.randint(3, 17, (4, 2, 6), generator=torch.Generator().manual_seed(0))

    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, rows: Tensor) -> Tensor:
            return summed([partial(self.part, row) for row in rows], self.model)

        def part(self, ids: Tensor) -> Tensor:
            return model(ids).logits.logsumexp(-1).mean()

    wrapped = DistributedDataParallel(Divided())
    wrapped(inputs[2 * rank : 2 * rank + 2]).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    (torch.stack([Divided().part(ids) for ids in inputs]).sum() / 2).backward()
    for own, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(own, parameter.grad, rtol=1e-4, atol=1e-6)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_the_divided_gradients(tmp_path: Path) -> None:
    multiprocessing.spawn(_in_one_of_two, (str(tmp_path),), nprocs=2)
