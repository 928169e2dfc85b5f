"""What several processes do to one another's models, without a run around it; each asserts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import make_model, make_module, make_qwen2, save_model, sharpen
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from sdft.callbacks.ema_teacher import update_average
from sdft.cell_cache import model_digest
from sdft.decode import DecodeEngine
from sdft.direct import DirectForward
from sdft.draws import Draws, drawing
from sdft.head import gathered_head, head
from sdft.head_losses import head_divergence
from sdft.losses import zero_loss
from sdft.packing import completion_hidden
from sdft.ranks import agreed, gathered, means, part_of_mean, rank, ranks, summed
from sdft.rollout import GenerateEngine, Rollout, RolloutEngine, Sampling
from sdft.sharding import forwarded, is_sharded, shard, whole, whole_state
from sdft.suites.completions import Order
from sdft.suites.desk import Desk
from sdft.suites.likelihood import Pair
from sdft.weights import frozen_copy, identity, squared_distance, weights_digest

PROMPTS = [[3, 9, 10], [4, 11, 12, 13, 9], [3, 10]]


def mesh() -> DeviceMesh:
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", rank=_local_rank(), world_size=2)
    return init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))


def _local_rank() -> int:
    import os

    return int(os.environ["LOCAL_RANK"])


def sharded(model: PreTrainedModel) -> PreTrainedModel:
    shard(model, mesh())
    assert is_sharded(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def talking(folder: Path) -> None:
    mesh()
    assert (rank(), ranks()) == (_local_rank(), 2)
    assert gathered(rank()) == [0, 1]
    assert agreed(f"of rank {rank()}") == "of rank 0"
    assert summed(torch.tensor([1.0, float(rank())])).tolist() == [2.0, 1.0]
    # Three things here, one there: means 2 and 6, together (3·2 + 6) / 4.
    count, mean = (3, 2.0) if rank() == 0 else (1, 6.0)
    values = {"a": mean, "b": torch.tensor(mean)}
    assert means(values, count, torch.empty(0)) == {"a": 3.0, "b": 3.0}
    parts = gathered(float(part_of_mean(torch.tensor(mean), count)))
    assert sum(parts) / 2 == 3.0
    # Nobody has anything, or what one without anything says is no number.
    assert means({"a": float("nan")}, 0, torch.empty(0)) == {"a": 0.0}
    nothing = float("nan") if rank() == 1 else 5.0
    assert means({"a": nothing}, 1 - rank(), torch.empty(0)) == {"a": 5.0}
    assert float(part_of_mean(torch.tensor(1.0), 0)) == 0.0


class Counted(TorchDispatchMode):
    """Counts all-gathers."""

    calls = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls += str(function).startswith("c10d.") and "gather" in str(function)
        return function(*args, **(kwargs or {}))


def gathers(model: PreTrainedModel, engine: RolloutEngine, tokens: int) -> tuple[int, Rollout]:
    """All-gathers of one rollout in which no row ends."""
    with Counted() as counted, whole(model):
        rollout = engine.generate(model, PROMPTS, Sampling(tokens, temperature=0.0), [], 0)
    return counted.calls, rollout


def rollouts(folder: Path) -> None:
    """A rollout gathers each weight once, however long it gets, and is that of the whole model."""
    for make in (make_model, make_qwen2):
        plain, model = sharpen(make()), sharded(sharpen(make()))
        for engine in (DecodeEngine(), DecodeEngine(direct=False), GenerateEngine()):
            short, _ = gathers(model, engine, 2)
            long, rollout = gathers(model, engine, 9)
            assert short == long == 4, (short, long)  # two layers, the rest, and the first of all
            expected = engine.generate(plain, PROMPTS, Sampling(9, temperature=0.0), [], 0)
            assert torch.equal(rollout.ids_BT, expected.ids_BT)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def lonely_rollouts(folder: Path) -> None:
    """Processes need not decode alike: one may have more batches, and longer ones."""
    model = sharded(sharpen(make_model()))
    for engine in (DecodeEngine(), DecodeEngine(direct=False), GenerateEngine()):
        with whole(model):
            for _ in range(3 * rank()):
                engine.generate(model, PROMPTS, Sampling(4 + rank()), [1], 0)
    distributed.barrier()


def direct(folder: Path) -> None:
    """Whole weights are decoded without their model's `forward`, as those of any other model."""
    used: list[PreTrainedModel] = []
    init = DirectForward.__init__

    def spy(self: DirectForward, model: PreTrainedModel, tokens: int) -> None:
        used.append(model)
        init(self, model, tokens)

    DirectForward.__init__ = spy  # type: ignore[method-assign]
    model = sharded(make_model())
    with whole(model):
        DecodeEngine().generate(model, PROMPTS, Sampling(3), [1], 0)
    DirectForward.__init__ = init  # type: ignore[method-assign]
    assert model in used


def numbers(folder: Path) -> None:
    """A row's completion is the same whichever process draws it."""
    mesh()
    model = sharpen(make_model(), 2.0)
    prompts, sampling = [*PROMPTS, [5, 6], [7, 8, 9]], Sampling(12)
    torch.manual_seed(3)
    alone = DecodeEngine().generate(model, prompts, sampling, [1], 0).completions()
    torch.manual_seed(100 + rank())
    own = tuple(range(len(prompts)))[rank() :: 2]
    with drawing(Draws(own, len(prompts), 3)):
        rollout = DecodeEngine().generate(model, [prompts[i] for i in own], sampling, [1], 0)
    assert rollout.completions() == [alone[i] for i in own]
    assert len(set(map(tuple, alone))) == len(prompts)


def average(folder: Path) -> None:
    """The average of shards is the shards of the average."""
    student, teacher = make_model(1), frozen_copy(make_model(2))
    expected = frozen_copy(teacher)
    update_average(expected, student, 0.3)
    base = frozen_copy(make_model(3))
    distance = squared_distance(student, base)
    digest, known = weights_digest(student), identity(student)
    for model in (student, teacher, base):
        sharded(model)
    update_average(teacher, student, 0.3)
    with whole(teacher):
        found = {name: value.clone() for name, value in teacher.named_parameters()}
    assert all(torch.equal(found[name], value) for name, value in expected.named_parameters())
    torch.testing.assert_close(squared_distance(student, base), distance)
    assert (weights_digest(student), identity(student)) == (digest, known)
    state = whole_state(student)
    assert state is not None
    assert bool(state) == (rank() == 0)
    teacher.to(torch.bfloat16)  # type: ignore[arg-type]
    before = weights_digest(teacher)
    update_average(teacher, student, 0.3, seed=1)
    assert weights_digest(teacher) != before
    assert len(set(gathered(weights_digest(teacher)))) == 1


def hidden_loss(student: PreTrainedModel, teacher: PreTrainedModel, completion: Rollout) -> Tensor:
    with torch.no_grad():
        teacher_ND = forwarded(teacher, lambda: completion_hidden(teacher, PROMPTS, completion))
    known = gathered_head(teacher)
    assert head(student) is not None
    assert known is not None

    def loss() -> Tensor:
        own = head(student)
        assert own is not None
        student_ND = completion_hidden(student, PROMPTS, completion)
        return head_divergence(student_ND, own, teacher_ND, known).sum()

    return forwarded(student, loss)


def gradients(folder: Path) -> None:
    """Through the fused loss, a head by itself or tied to the embedding, onto the shards."""
    ids_BT = torch.tensor([[9, 10, 11, 12], [5, 6, 7, 8], [9, 8, 7, 6]])
    completion = Rollout(ids_BT, torch.ones_like(ids_BT).bool(), torch.zeros(3).bool())
    for make in (make_model, make_qwen2):
        student, teacher = sharpen(make(1)).train(), frozen_copy(sharpen(make(2)))
        loss = hidden_loss(student, teacher, completion)
        loss.backward()
        expected = {name: p.grad for name, p in student.named_parameters()}
        again, teacher_again = sharpen(make(1)).train(), frozen_copy(sharpen(make(2)))
        shards = [sharded(again), sharded(teacher_again)]
        found = hidden_loss(shards[0], shards[1], completion)
        found.backward()
        torch.testing.assert_close(found, loss)
        for name, parameter in shards[0].named_parameters():
            assert isinstance(parameter.grad, DTensor)
            torch.testing.assert_close(parameter.grad.full_tensor(), expected[name])
        zero_loss(shards[0].parameters()).backward()
        torch.testing.assert_close(
            next(shards[0].parameters()).grad.full_tensor(),  # type: ignore[union-attr]
            expected[next(iter(expected))],
        )


def half(folder: Path) -> None:
    """With bf16-mixed whole weights are bfloat16, shards and gradients fp32."""
    model = make_model()
    shard(model, mesh(), "bf16-mixed")
    model(torch.tensor([[3, 4, 5]])).logits.float().sum().backward()
    with whole(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    kinds = {(p.dtype, p.grad.dtype) for p in model.parameters() if p.grad is not None}
    assert kinds == {(torch.float32, torch.float32)}


def columns(folder: Path) -> None:
    """What suites ask for, and the digest of a model, over whole and sharded weights."""
    pairs = [Pair((3, 9, 10), (11,)), Pair((3, 9), (10, 11)), Pair((4,), (9, 10, 11))]
    order = Order(Sampling(7, temperature=0.0), ("a",))
    mesh()
    if rank() == 0:  # transformers writes there alone
        save_model(folder / "model")
    gathered(None)
    found = []
    for spread in (lambda model: model, sharded):
        module = make_module(folder / "model")
        module.configure_model()
        sharpen(module.model, 4.0)
        digest = model_digest(module.model)
        spread(module.model)
        desk = Desk(module, 2)
        if rank() == 0:
            found.append([desk.likelihoods(pairs), desk.complete(PROMPTS, order)])
            desk.close()
        else:
            desk.serve()
        assert model_digest(module.model) == digest
        assert len(set(gathered(digest))) == 1
    for here, there in zip(*(first[0] for first in found), strict=True) if rank() == 0 else ():
        assert abs(here.log_prob - there.log_prob) < 1e-4
        assert here.greedy == there.greedy
    assert rank() != 0 or found[0][1] == found[1][1]
