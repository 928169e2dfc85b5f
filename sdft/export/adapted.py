"""From a checkpoint of adapters to a model: their base is loaded, for checkpoints leave it out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.adapter_training import AdapterTraining
from sdft.adapters import MARK, merged, widen
from sdft.lora import LoRA
from sdft.models import DTYPES, ModelSource


def assemble_adapted(
    source: ModelSource, weights: Mapping[str, Tensor], identity: Mapping[str, Any]
) -> PreTrainedModel:
    """The base with the adapters of a student or a teacher.

    Args:
        source: Where the base comes from; it has to be the very one that was trained on.
        weights: The state of the adapters, by name.
        identity: What the checkpoint says of its model.

    Raises:
        ValueError: Another base, adapters that do not fit it, or values that are not finite.
    """
    try:
        lora, dtype = LoRA(**identity["lora"]), DTYPES[identity["dtype"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint does not describe its adapters: {error}") from error
    training = AdapterTraining(lora, identity.get("quantization"))
    model = source.load_model(dtype, quantization=training.quantization)
    training.inject(model)
    training.check(identity, source.name)
    ranks = {value.shape[0] for name, value in weights.items() if ".lora_A." in name}
    if ranks and max(ranks) != lora.rank:  # a teacher's
        widen(model, max(ranks))
    wanted = {name for name, _ in model.named_parameters() if MARK in name}
    if wanted != set(weights):
        odd = ", ".join(sorted(wanted ^ set(weights))[:3])
        raise ValueError(f"the adapters do not fit the model {source.name!r}: {odd}")
    try:
        model.load_state_dict(dict(weights), strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the adapters do not fit {source.name!r}: {reason}") from error
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite")
    model.eval()
    return model


def as_dense(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """An ordinary model with the adapters merged in, in this precision.

    Raises:
        ValueError: A weight overflows in it.
    """
    whole: PreTrainedModel = merged(model).to(dtype)  # type: ignore[arg-type]
    for name, value in whole.named_parameters():
        if not value.isfinite().all():
            raise ValueError(f"{name} overflows in {str(dtype).removeprefix('torch.')}")
    return whole
