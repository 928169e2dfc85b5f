"""How a strategy of Lightning spreads a module's models over its processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.strategies import FSDPStrategy
from transformers import PreTrainedModel

from sdft.decode import DecodeEngine
from sdft.direct import runs_directly
from sdft.flat_sharding import is_flat, mark_flat
from sdft.flops import ModelFlops
from sdft.ranks import ranks
from sdft.rollout import evaluation_mode
from sdft.run import run_folder, task_stream
from sdft.sharding import check_sharding, is_sharded, shard
from sdft.weights import identity

if TYPE_CHECKING:
    from sdft.model_copies import Models


def spread(module: Models, copies: list[PreTrainedModel], base: list[PreTrainedModel]) -> None:
    """Shard freshly loaded models as the trainer's strategy asks for; again changes nothing.

    Args:
        module: Holds the student.
        copies: Its submodules beside the student.
        base: Its model that is no submodule, or none.

    Raises:
        ValueError: The strategy and the module do not go together.
    """
    if module._trainer is None:
        return
    if ranks() > 1:
        run_folder(module.trainer)
    strategy, mesh = module.trainer.strategy, module.device_mesh
    if module.adapters.lora is not None and (
        isinstance(strategy, FSDPStrategy) or mesh is not None
    ):
        raise ValueError(
            f"model.lora works with whole weights (one device, or DDP), found the strategy "
            f"{type(strategy).__name__}: student, teacher and base share theirs, and adapters are "
            "small; take configs/ddp.yaml instead"
        )
    if isinstance(strategy, FSDPStrategy):
        _prepare_flat(module, copies, strategy)
    elif mesh is not None and not is_sharded(module.model):
        precision = str(module.trainer.precision)
        check_sharding(mesh, precision)
        if any(model.dtype != module.model.dtype for model in base):
            raise ValueError("model.base_storage must be float32 with sharded models")
        for model in (module.model, *copies, *base):
            shard(model, mesh["data_parallel"], precision)
        if module.penalty is not None and module.fitting:
            module.penalty.attach(module.model)  # anew, sharded as the student is


def _prepare_flat(module: Models, copies: list[PreTrainedModel], strategy: FSDPStrategy) -> None:
    """Check and note what can no longer be told once Lightning has wrapped the module."""
    if is_flat(module.model):
        return
    _check_flat(module)
    for model in (module.model, *copies):
        for name, value in ("sdft_flops", ModelFlops.of(model)), ("sdft_identity", identity(model)):
            setattr(model, name, value)
        mark_flat(model, strategy)


def _check_flat(module: Models) -> None:
    engine = module.engine
    with evaluation_mode(module.model):
        direct = isinstance(engine, DecodeEngine) and engine.direct
        if not direct or not runs_directly(module.model, [5, 6, 7, 8]):
            raise ValueError(
                "FSDPStrategy needs rollouts by DecodeEngine and a model that it runs directly "
                "(Llama, Mistral, Qwen2, Qwen3): take configs/fsdp.yaml instead"
            )
    others = [name for name in module.copies if name != "teacher"]
    if others or module.penalty is not None or task_stream(module.trainer).from_base_each_task:
        raise ValueError(
            f"the method {module.method!r}, its penalty or data.from_base_each_task does not work "
            "with FSDPStrategy: take configs/fsdp.yaml instead"
        )
