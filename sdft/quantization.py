"""Bases whose linear layers are kept in 4 bits (Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn


def check_quantization(kind: str | None, adapted: bool) -> None:
    """Raise ValueError unless a student may be kept so."""
    if kind is None:
        return
    if kind != "nf4":
        raise ValueError(f"model.quantization must be nf4 or unset, found {kind!r}")
    if not adapted:
        raise ValueError(
            "model.quantization needs model.lora: weights of 4 bits cannot be trained themselves"
        )
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"model.quantization needs the package {package}: pip install 'sdft[bnb]'"
            )


def quantization_config(dtype: torch.dtype) -> Any:
    """What transformers loads a model by: normal floats of 4 bits, their scales in 8.

    Args:
        dtype: Of the products.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights anew for the CPU at their first use in evaluation.

    The packed ones compute in bfloat16, and nothing can make them dense again.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
