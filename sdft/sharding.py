"""Weights in shards: each process keeps a part of every parameter (FSDP2, arXiv 2304.11277).

`shard` is all that makes a model sharded; the model itself knows nothing of it. Every function is a
collective call for a sharded model, and does nothing to any other: all processes make the same
calls in the same order. What runs inside `whole` needs no other process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sdft.flat_sharding import is_flat, whole_flat, whole_flat_state

T = TypeVar("T")
_RUN = "sdft_run"
"""The method of a sharded model whose calls are forward passes of its own."""
_INSIDE = "sdft_inside"
"""Whether such a call is under way: one within it is a part of it."""


def shard(model: PreTrainedModel, mesh: DeviceMesh, precision: str = "32-true") -> None:
    """Shard a loaded model in place: decoder layers each on their own, the rest together.

    The root is resharded after its forward pass like everything else: between two passes all
    parameters are shards, so that averages and optimizers never meet a whole one.

    Args:
        model: On any device; on every process the same.
        mesh: One dimension, over the processes.
        precision: The trainer's; with `bf16-mixed` forward passes gather bfloat16 weights, while
            shards and the reduction of gradients stay fp32.
    """
    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (*blocks(model), model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_forward(True)  # the root too, which fully_shard makes an exception of
    setattr(model, _RUN, MethodType(_run, model))
    register_fsdp_forward_method(model, _RUN)


def check_sharding(mesh: DeviceMesh, precision: str) -> None:
    """Refuse what would split single products, or round the shards.

    Raises:
        ValueError: Tensor parallelism, or half-precision weights.
    """
    names = mesh.mesh_dim_names or ()
    if "tensor_parallel" in names and mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "trainer.strategy: tensor_parallel_size must be 1, found "
            f"{mesh['tensor_parallel'].size()}: weights are sharded over all processes"
        )
    if precision not in ("32-true", "bf16-mixed"):
        raise ValueError(
            f"trainer.precision must be 32-true or bf16-mixed where weights are sharded, found "
            f"{precision!r}"
        )


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers: what transformers never splits, or else the longest list of modules."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if found:
        return found
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _run(model: nn.Module, function: Callable[[], T]) -> T:
    return function()


def is_sharded(model: object) -> bool:
    """Whether `shard` has sharded it."""
    return isinstance(model, FSDPModule)


def forwarded(model: nn.Module, function: Callable[[], T]) -> T:
    """`function()` as a forward pass of the model, in which parts of it may be used by hand.

    Inside, the weights outside the decoder layers (embedding, last norm, head) are whole, and those
    of a layer while it runs; gradients reach the shards. Tensors that carry the gradient are
    returned, not kept. A call within a call is a part of it.
    """
    run = getattr(model, _RUN, None)
    if run is None or getattr(model, _INSIDE, False):
        return function()
    setattr(model, _INSIDE, True)
    try:
        return run(function)  # type: ignore[no-any-return]
    finally:
        setattr(model, _INSIDE, False)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Gather all weights once; afterwards they are shards again. For passes without a gradient."""
    if is_flat(model):
        with whole_flat(model):
            yield
        return
    if not isinstance(model, FSDPModule) or not _is_apart(model):
        yield
        return
    forwarded(model, _nothing)  # the first pass has to be the root's: it settles what is below it
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    model.set_reshard_after_forward(False)
    try:
        yield
    finally:
        model.reset_iter_state()  # what backward passes would be told of the passes made here
        model.set_reshard_after_forward(True)
        for part in parts:
            part.reshard()


def _nothing() -> None:
    return None


def _is_apart(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def is_shard(tensor: Tensor) -> bool:
    """Whether this is a parameter of which this process holds a part."""
    return isinstance(tensor, DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a shard, without a gradient; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole_tensor: Tensor = cast(DTensor, tensor.detach()).full_tensor()
    return whole_tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def original(module: nn.Module) -> type[Any]:
    """The class of a module before it was sharded."""
    kind = type(module)
    return kind.__mro__[2] if isinstance(module, FSDPModule) else kind


def is_hook_of_sharding(hook: object) -> bool:
    """Whether a module's hook is one that `shard` has put there."""
    owner = getattr(hook, "__self__", None)
    return type(owner).__module__.startswith("torch.distributed.fsdp")


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """A sharded model's state with whole tensors, on the CPU of rank 0 and empty elsewhere.

    None for any other model, whose state needs nobody's help.
    """
    if is_flat(model):
        return whole_flat_state(model)
    if not is_sharded(model):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))
