"""From a checkpoint's weights to the model that is written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from sdft.export.adapted import as_dense, assemble_adapted
from sdft.hub import load_failure
from sdft.models import ModelSource
from sdft.weights import check_identity

_ADAPTERS = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|up_OR|down_RI)(\.|$)")
_QUANTISED = re.compile(r"\.(absmax|quant_map|quant_state(\.\w+)*|nested_\w+|qweight|SCB)$")


def assemble(
    source: ModelSource,
    weights: Mapping[str, Tensor],
    identity: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    merge: bool = True,
) -> PreTrainedModel:
    """The model that holds these weights, each of them as it was saved.

    This is the one place that knows how a state becomes a model: what adapters need belongs here.

    Args:
        source: Where the base model's configuration comes from; its weights are not read.
        weights: The state of one model, by name.
        identity: What the checkpoint says of its model (`sdft.weights.identity`).
        dtype: Of the parameters; the widest among the weights when None.
        merge: Merge adapters into the weights; else the model has them.

    Raises:
        ValueError: Weights of another model, adapters of another base, or values that are not
            finite in `dtype`.
    """
    if identity.get("adapters"):
        adapted = assemble_adapted(source, weights, identity)
        return as_dense(adapted, dtype or widest(weights.values())) if merge else adapted
    _check_plain(weights, merge)
    config = _load_config(source)
    model = _empty(source, config, dtype or widest(weights.values()))
    check_identity(model, source.name, identity)
    try:
        model.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights do not fit the model {source.name!r}: {reason}") from error
    _check_values(model, weights)
    model.generation_config = _generation_config(source, config)
    model.eval()
    return model


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The floating-point type that holds all of these exactly."""
    found = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    wide = torch.float32
    for number, dtype in enumerate(sorted(found, key=str)):
        wide = torch.promote_types(wide, dtype) if number else dtype
    return wide


def _check_plain(weights: Mapping[str, Tensor], merge: bool) -> None:
    if any(_QUANTISED.search(name) for name in weights):
        raise ValueError("the checkpoint holds quantised weights, which export cannot write yet")
    if adapter := next((name for name in weights if _ADAPTERS.search(name)), None):
        raise ValueError(f"the checkpoint holds adapters ({adapter}) of an unknown kind")
    if not merge:
        raise ValueError("--no-merge: the checkpoint holds no adapters, there is nothing to merge")


def _load_config(source: ModelSource) -> PretrainedConfig:
    try:
        return cast(PretrainedConfig, AutoConfig.from_pretrained(source.location, **source.options))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the base model {source.name!r} has no readable configuration "
            f"({load_failure(error)}); --model says where it is"
        ) from error


def _empty(source: ModelSource, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    # Not on the meta device: buffers outside the state are computed here.
    make = cast(Any, AutoModelForCausalLM.from_config)
    trust = source.options["trust_remote_code"]
    return cast(PreTrainedModel, make(config, dtype=dtype, trust_remote_code=trust))


def _generation_config(source: ModelSource, config: PretrainedConfig) -> GenerationConfig:
    revision = {key: source.options[key] for key in ("revision",) if key in source.options}
    try:
        found = GenerationConfig.from_pretrained(source.location, **revision)
    except OSError:  # older models keep these settings in their configuration
        found = GenerationConfig.from_model_config(config)
    return found


@torch.no_grad()
def _check_values(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    for name, own in model.state_dict().items():
        if own.is_floating_point() and not own.isfinite().all():
            reason = "is not finite" if not weights[name].isfinite().all() else "overflows"
            raise ValueError(f"{name} {reason} in {str(own.dtype).removeprefix('torch.')}")
        if not torch.equal(own, weights[name].to(own.dtype)):  # of a tied pair the last one stays
            raise ValueError(
                f"{name} is tied to another weight in the model, but differs from it in the "
                "checkpoint"
            )
