"""Adapters as files that peft loads: `PeftModel.from_pretrained(base, folder)`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from sdft.adapters import adapters
from sdft.lora import LoRA


def save_adapters(model: nn.Module, lora: LoRA, base: str, folder: Path) -> None:
    """Write a model's adapters in peft's format.

    Args:
        model: A student, or a teacher over adapters, whose ranks and scales are its own.
        lora: What the student's were made by.
        base: Name or folder of the base model, for whoever loads them.
        folder: Made if missing.
    """
    found = adapters(model)
    weights, ranks, scales = {}, {}, {}
    for name, adapter in found.items():
        weights[f"base_model.model.{name}.lora_A.weight"] = adapter.down_RI.cpu().contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = adapter.up_OR.cpu().contiguous()
        ranks[name] = adapter.down_RI.shape[0]
        scales[name] = adapter.scale * ranks[name]
    config = replace(lora, target_modules=list(found)).config()
    config.base_model_name_or_path = base
    config.rank_pattern, config.alpha_pattern = ranks, scales
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
