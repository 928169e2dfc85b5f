"""Lightning's strategies for several processes, with what this project needs of them.

The overlays `configs/ddp.yaml`, `configs/fsdp.yaml` and `configs/fsdp1.yaml` name them.
"""

from __future__ import annotations

import inspect
import math
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers.modeling_layers import GradientCheckpointingLayer

from sdft.atomic import temporary_path
from sdft.checkpoint_reader import check_harmless
from sdft.checkpoints import agreed_checkpoint, replace_checkpoint
from sdft.folder_seal import seal_folder
from sdft.sealed_io import label_of
from sdft.shard_reader import FACTS, renamed

MINUTES = 10.0
_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = next(  # newer torch renames it
    name for name in ("forward_sync_buffers", "broadcast_buffers") if name in _ARGUMENTS
)


class ReplicatedStrategy(DDPStrategy):
    """DDP: every process holds all models, and gradients are averaged.

    Args:
        timeout_minutes: How long a process waits for the others before the run ends with an error.
        process_group_backend: How processes talk: `nccl` on GPUs, `gloo` on CPUs when unset.

    Raises:
        ValueError: A timeout that is not above 0.
    """

    def __init__(
        self, timeout_minutes: float = MINUTES, process_group_backend: str | None = None
    ) -> None:
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=_timeout(timeout_minutes),
            # All buffers are the same everywhere, those of a penalty as large as the model.
            **cast(dict[str, Any], {_SYNC_BUFFERS: False}),
        )


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2: every process holds a part of each parameter, of its gradient and of its moments.

    Args:
        timeout_minutes: How long a process waits for the others before the run ends with an error.
        process_group_backend: How processes talk: `nccl` on GPUs, `gloo` on CPUs when unset.
        save_distributed_checkpoint: Have every process write its part of a checkpoint, into a
            folder, instead of one that gathers everything and writes a file.

    Raises:
        ValueError: A timeout that is not above 0.
    """

    def __init__(
        self,
        timeout_minutes: float = MINUTES,
        process_group_backend: str | None = None,
        save_distributed_checkpoint: bool = False,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=_timeout(timeout_minutes),
        )

    def setup_environment(self) -> None:
        """Shard over all processes there are."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as an optimizer of one process would save it: of whole tensors, by number."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        assert self.model is not None
        plain = getattr(optimizer, "optimizer", optimizer)
        state = cast(
            dict[str, Any], get_optimizer_state_dict(self.model, plain, options=_options())
        )
        if self.global_rank > 0:
            return {}
        names = [name for group in state["param_groups"] for name in group["params"]]
        return renamed(state, {name: number for number, name in enumerate(names)})

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write; a folder, too, is sealed and under a temporary name until it is complete.

        Raises:
            OSError: It cannot be written.
            CheckpointException: The same, in the words of torch.
        """
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path, label = Path(self.broadcast(filepath)), label_of(checkpoint)
        if path.suffix == ".tmp":  # somebody else renames it
            super().save_checkpoint(checkpoint, path, storage_options)
            seal_folder(path, label)
            return
        temporary = self.broadcast(temporary_path(path))
        super().save_checkpoint(checkpoint, temporary, storage_options)
        seal_folder(temporary, label)
        if self.is_global_zero:
            replace_checkpoint(temporary, path)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load, once it is clear that the checkpoint is whole and one of this model.

        Raises:
            ValueError: See `StudentModule.check_checkpoint`, `check_checkpoint` and
                `check_harmless`.
        """
        path = agreed_checkpoint(Path(checkpoint_path))
        if weights_only is not False:
            check_harmless(path)
        # Weights are loaded before the module hears of it.
        facts = path if path.is_file() else path / FACTS
        found = torch.load(facts, mmap=True, map_location="cpu", weights_only=weights_only)
        check = getattr(self.lightning_module, "check_checkpoint", None)
        if check is not None:
            check(found)
        if not path.is_file():
            return super().load_checkpoint(path, weights_only)
        # Lightning takes numbers for those of all parameters, frozen ones included.
        optimizers, self.optimizers = self.optimizers, []
        try:
            checkpoint = super().load_checkpoint(path, weights_only)
        finally:
            self.optimizers = optimizers
        for optimizer, state in zip(optimizers, checkpoint["optimizer_states"], strict=False):
            self._load_optimizer(optimizer, state)
        return checkpoint

    def _load_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        assert self.model is not None
        if not state["state"]:  # nothing to deal out; torch would make up moments
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                group.update({key: value for key, value in saved.items() if key != "params"})
            return
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        held = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        named = renamed(state, dict(enumerate(held)))
        set_optimizer_state_dict(self.model, optimizer, named, options=_options(broadcast=True))


class FlatShardedStrategy(FSDPStrategy):
    """FSDP1, the older kind of sharding: GPUs only, and with limits (docs/multi_gpu.md).

    Args:
        timeout_minutes: How long a process waits for the others before the run ends with an error.
        process_group_backend: How processes talk: `nccl` when unset.

    Raises:
        ValueError: A timeout that is not above 0.
    """

    def __init__(
        self, timeout_minutes: float = MINUTES, process_group_backend: str | None = None
    ) -> None:
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=_timeout(timeout_minutes),
            auto_wrap_policy=_is_decoder_layer,
            state_dict_type="full",
            use_orig_params=True,
        )

    def setup_environment(self) -> None:
        """Refuse what torch would refuse later.

        Raises:
            ValueError: There is no GPU.
        """
        if self.root_device.type == "cpu":
            raise ValueError(
                "trainer.strategy: FSDP1 needs GPUs, found trainer.accelerator 'cpu': take "
                "configs/fsdp.yaml, which shards on CPUs, too"
            )
        super().setup_environment()

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load, once it is clear that the checkpoint is whole and runs no code.

        Raises:
            ValueError: See `check_checkpoint` and `check_harmless`, or a folder.
        """
        path = agreed_checkpoint(Path(checkpoint_path))
        if weights_only is not False:
            check_harmless(path)
        if path.is_dir():
            raise ValueError(
                f"{path} is a sharded checkpoint, which FSDP1 cannot read: go on with "
                "configs/fsdp.yaml, with configs/ddp.yaml, or in one process"
            )
        return super().load_checkpoint(path, weights_only)


def _is_decoder_layer(module: Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """torch's question: whether to look below a module, and whether to wrap it."""
    return recurse or isinstance(module, GradientCheckpointingLayer)


def _options(broadcast: bool = False) -> StateDictOptions:
    return StateDictOptions(
        full_state_dict=True, cpu_offload=not broadcast, broadcast_from_rank0=broadcast
    )


def _timeout(minutes: float) -> timedelta:
    if not (math.isfinite(minutes) and minutes > 0):
        raise ValueError(f"trainer.strategy: timeout_minutes must be above 0, found {minutes}")
    return timedelta(minutes=minutes)
