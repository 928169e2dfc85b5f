"""Sharding of the older kind (FSDP1), where Lightning wraps the whole module and a GPU is needed.

Unlike FSDP2 (`sdft.sharding`), it makes one flat tensor of all that lies outside the decoder
layers, student and teacher together, and passes through a model are possible in a training step
alone. So rollouts read whole weights (`sdft.direct`), and what would pass through a model elsewhere
is refused. torch refuses it on CPUs: this has been read against torch's source and never been run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as Flat
from torch.distributed.fsdp._common_utils import TrainingState

_ROOT = "sdft_flat_root"
"""What finds the module that Lightning has wrapped, from one of the models in it."""


def mark_flat(model: nn.Module, strategy: Any) -> None:
    """Note that a strategy is about to wrap the module that holds this model."""
    # A tuple hides it from `nn.Module`, which would take the root for a part of its part.
    setattr(model, _ROOT, (strategy,))


def is_flat(model: object) -> bool:
    """Whether `mark_flat` has marked it."""
    return hasattr(model, _ROOT)


def _root(model: nn.Module) -> Flat:
    root = getattr(model, _ROOT)[0].model
    assert isinstance(root, Flat), "Lightning wraps the module before training"
    return root


def inner(module: Any) -> Any:
    """A decoder layer in its wrapper, or as it is."""
    return getattr(module, "_fsdp_wrapped_module", module)


@contextmanager
def whole_flat(model: nn.Module) -> Iterator[None]:
    """All weights of the model, to be read by hand; no pass through it is possible meanwhile."""
    root = _root(model)
    with ExitStack() as stack:
        if root.training_state == TrainingState.IDLE:  # in a step these are whole already
            stack.enter_context(Flat.summon_full_params(root, recurse=False, writeback=False))
        stack.enter_context(Flat.summon_full_params(model, writeback=False))
        yield


@contextmanager
def aligned(model: nn.Module) -> Iterator[None]:
    """Parameters of models in one root, of like shape: outside decoder layers whole, within shards.

    What is written into them stays.
    """
    if not is_flat(model):
        yield
        return
    with Flat.summon_full_params(_root(model), recurse=False, writeback=True):
        yield


def whole_flat_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights on the CPU, under their names in the model as it was loaded."""
    with whole_flat(model):
        return {
            name.replace("_fsdp_wrapped_module.", ""): value.detach().cpu().clone()
            for name, value in model.named_parameters()
        }
