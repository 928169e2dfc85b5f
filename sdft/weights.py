"""A model's weights as a whole: copies, distances, and what a checkpoint must share with them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from sdft.adapters import is_adapted, own_parameters, twin
from sdft.ranks import summed
from sdft.sharding import gathered, is_sharded, local, original

GOOD_TEACHER = "good_teacher"
"""The module's copy of the teacher that a guard may go back to."""


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in fp32 and evaluation mode that never trains; of an adapted model, a twin."""
    if is_adapted(model):
        return twin(model)
    other: PreTrainedModel = copy.deepcopy(model).float().eval()
    return other.requires_grad_(False)


def convert(copied: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a copy's own parameters this precision, and leave alone what it shares."""
    if is_adapted(copied):
        for parameter in own_parameters(copied):
            parameter.data = parameter.data.to(dtype)
    else:
        copied.to(dtype)  # type: ignore[arg-type]


def halved(base: PreTrainedModel) -> PreTrainedModel:
    """The base with its weights in bfloat16, where that rounds none of them.

    Raises:
        ValueError: It would round some.
    """
    for name, value in base.named_parameters():
        if not torch.equal(value.bfloat16().to(value.dtype), value):
            raise ValueError(
                f"model.base_storage is bfloat16, which would round the base's {name}: it must be "
                "float32 for a model that was not published in bfloat16"
            )
    base.to(torch.bfloat16)  # type: ignore[arg-type]
    return base


@torch.no_grad()
def set_weights(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """Copy the parameters and buffers of a model of the same architecture, to any precision."""
    for own, other in (
        *zip(own_parameters(model), own_parameters(source), strict=True),
        *zip(model.buffers(), source.buffers(), strict=True),
    ):
        own.copy_(other)


def squared_distance(first: PreTrainedModel, second: PreTrainedModel) -> Tensor:
    """‖first − second‖² over all parameters, fp32."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    terms = [(local(a.detach()).float() - local(b.detach())).square().sum() for a, b in pairs]
    total = torch.stack(terms).sum()
    return summed(total) if is_sharded(first) else total


def trained_parameters(model: PreTrainedModel) -> dict[str, Parameter]:
    """The parameters that training may change, by name; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def identity(model: PreTrainedModel) -> dict[str, str]:
    """What a checkpoint must share with the model that it is loaded into."""
    known = getattr(model, "sdft_identity", None)
    if isinstance(known, dict):  # of a model whose parameters no longer show their shape
        return known
    shapes = sorted((name, tuple(value.shape)) for name, value in model.named_parameters())
    return {
        "architecture": original(model).__name__,
        "parameters": str(sum(value.numel() for value in model.parameters())),
        "shapes": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
    }


def weights_digest(model: PreTrainedModel) -> str:
    """A hash of every parameter's name, type and value."""
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = gathered(value.detach()).cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_identity(model: PreTrainedModel, name: str, found: Mapping[str, Any]) -> None:
    """Compare a model with what a checkpoint says of its own.

    Raises:
        ValueError: They differ; names both.
    """
    own = identity(model)
    if any(found.get(key) != value for key, value in own.items()):
        raise ValueError(
            f"the checkpoint belongs to another model: {found.get('model')!r} "
            f"({found.get('architecture')}, {found.get('parameters')} parameters), this run's is "
            f"{name!r} ({own['architecture']}, {own['parameters']} parameters)"
        )


def check_training(own: Mapping[str, str], found: Mapping[str, Any]) -> None:
    """Compare the run's method and penalty with those that a checkpoint was trained with.

    Raises:
        ValueError: They differ; names both.
    """
    for what, name in own.items():
        other = found.get(what, "")
        if other != name:
            raise ValueError(
                f"the checkpoint belongs to the {what} {other or 'none'!r}, this run's is "
                f"{name or 'none'!r}: resume with the configuration that made it"
            )


def split_copies(weights: dict[str, Tensor], own: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """The state of the student's copies and of its penalty, apart from the student's own.

    Args:
        weights: A checkpoint's state by name; what `own` has no place for (validation, test and
            prediction need no copies) is removed from it.
        own: The names of the module's state.

    Returns:
        Submodule → its state, as it was saved.
    """
    kept: dict[str, dict[str, Tensor]] = {}
    if any(key.startswith(f"{GOOD_TEACHER}.") for key in own):
        _complete(weights)
    for part in ("teacher", "anchor", "penalty", GOOD_TEACHER):
        saved = [key for key in weights if key.startswith(f"{part}.")]
        if any(key.startswith(f"{part}.") for key in own):
            kept[part] = {key.removeprefix(f"{part}."): weights[key] for key in saved}
        else:
            for key in saved:
                del weights[key]
    return kept


def _complete(weights: dict[str, Tensor]) -> None:
    """Take the teacher for the good one in a checkpoint that has none: it had no guard."""
    if any(key.startswith(f"{GOOD_TEACHER}.") for key in weights):
        return
    for key in [key for key in weights if key.startswith("teacher.")]:
        weights[f"{GOOD_TEACHER}.{key.removeprefix('teacher.')}"] = weights[key].clone()
