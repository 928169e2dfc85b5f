"""A digest of everything that a model holds."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sdft.sharding import original

_CHUNK = 2**26
"""Bytes that are copied to the CPU at once."""
_ELSEWHERE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Settings that say where a model comes from, not what it computes; weights say their own type."""


@torch.no_grad()
def model_digest(model: PreTrainedModel) -> str:
    """SHA-256 of a model's weights, buffers and settings; a collective call for a sharded model.

    Every bit counts, with its name, type and shape. Adapters count as they are, unmerged, and
    quantised weights with their scales.
    """
    digest = hashlib.sha256(json.dumps(_settings(model), sort_keys=True, default=repr).encode())
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):
            digest.update(f"{name}={value!r}\n".encode())
            continue
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        same = (value.data_ptr(), value.dtype, tuple(value.shape), tuple(value.stride()))
        if not isinstance(value, DTensor) and value.numel() and same in seen:  # tied
            digest.update(f"{name}→{seen[same]}\n".encode())
            continue
        seen[same] = name
        digest.update(f"{name}:{whole.dtype}:{tuple(whole.shape)}\n".encode())
        _add(digest, whole)
    return digest.hexdigest()


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.to_dict()
    own = {key: value for key, value in config.items() if key not in _ELSEWHERE}
    attention = getattr(model.config, "_attn_implementation", None)
    return {**own, "attention": attention, "class": original(model).__name__}


def _add(digest: Any, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        return
    bytes_N = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for part in bytes_N.split(_CHUNK):
        digest.update(part.cpu().numpy().data)
