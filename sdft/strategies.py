"""Lightning's strategies for several processes, with what this project needs of them.

`configs/ddp.yaml` and `configs/fsdp.yaml` name them; a class of Lightning's own may stand there too.
"""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

MINUTES = 10.0


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
            broadcast_buffers=False,
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

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load, once it is clear that the checkpoint is one of this model.

        Raises:
            ValueError: See `StudentModule.check_checkpoint`.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_file():  # weights are loaded before the module hears of it
            found = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
            check = getattr(self.lightning_module, "check_checkpoint", None)
            if check is not None:
                check(found)
        return super().load_checkpoint(path, weights_only)


def _timeout(minutes: float) -> timedelta:
    if not (math.isfinite(minutes) and minutes > 0):
        raise ValueError(f"trainer.strategy: timeout_minutes must be above 0, found {minutes}")
    return timedelta(minutes=minutes)
