"""What the adapters of a model are, and models that share all but them.

A teacher over adapters is a model of its own whose base weights are the student's very tensors:
only its adapters take memory. The base model is the same without adapters.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel

from sdft.lora import ADAPTER

MARK = ".lora_"
"""Stands in the name of every parameter of an adapter, and of no other."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """The adapter of one linear layer: its product is scale · B · A.

    Attributes:
        down_RI: A, `[rank, inputs]`.
        up_OR: B, `[outputs, rank]`.
        scale: Factor of the product.
    """

    down_RI: Tensor
    up_OR: Tensor
    scale: float

    def product(self) -> Tensor:
        """What the adapter adds to the layer's weight, `[outputs, inputs]`."""
        return self.scale * (self.up_OR @ self.down_RI)

    def squared_norm(self) -> Tensor:
        """‖product‖² without the product: tr(BᵀB·AAᵀ), fp64."""
        down, up = self.down_RI.double(), self.up_OR.double()
        return self.scale**2 * ((up.T @ up) * (down @ down.T)).sum()


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any(_has_adapter(module) for module in model.modules())


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by the names of their layers; tensors are the parameters' own."""
    return {name: adapter_of(m) for name, m in model.named_modules() if _has_adapter(m)}


def adapter_of(layer: Any) -> Adapter:
    """The adapter of an adapted layer."""
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return Adapter(down.detach(), up.detach(), float(layer.scaling[ADAPTER]))


def own_parameters(model: PreTrainedModel) -> list[Parameter]:
    """The parameters that a copy of the model has to itself: of an adapted one, its adapters."""
    if not is_adapted(model):
        return list(model.parameters())
    return [parameter for name, parameter in model.named_parameters() if MARK in name]


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model with the same base weights, not copies of them, and adapters of its own."""
    shared: dict[int, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if MARK not in name:
            shared[id(tensor)] = tensor
    for module in model.modules():  # of a quantised layer
        if (state := getattr(module, "quant_state", None)) is not None:
            shared[id(state)] = state
    other: PreTrainedModel = copy.deepcopy(model, shared).eval()
    return other.requires_grad_(False)


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The base of an adapted model, sharing its weights."""
    base = twin(model)
    for name, layer in _adapted_layers(base):
        _replace(base, name, layer.base_layer)
    return base


def widen(model: PreTrainedModel, rank: int) -> None:
    """Give a twin's adapters this rank, scale 1 and a product of zero."""
    for _, layer in _adapted_layers(model):
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        size = min(rank, down.in_features, up.out_features)
        for factors, shape in (
            (layer.lora_A, (down.in_features, size)),
            (layer.lora_B, (size, up.out_features)),
        ):
            linear = nn.Linear(*shape, bias=False, device=down.weight.device)
            linear.weight.requires_grad_(False).zero_()
            factors[ADAPTER] = linear
        layer.r[ADAPTER], layer.scaling[ADAPTER] = size, 1.0
    model.eval()


@torch.no_grad()
def merged(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model whose weights have the adapters' products added; the given one is kept.

    A quantised base is made dense, for its weights can take no product.
    """
    whole = twin(model)
    for name, layer in _adapted_layers(whole):
        _replace(whole, name, _merged_layer(layer).requires_grad_(False))
    if hasattr(whole.config, "quantization_config"):
        del whole.config.quantization_config
        vars(whole).update(is_quantized=False, hf_quantizer=None)
    return whole


def _merged_layer(layer: Any) -> nn.Module:
    product, base = adapter_of(layer).product(), layer.base_layer
    weight = dense_weight(base)
    if layer.fan_in_fan_out:  # GPT-2 keeps its matrices the other way round
        product = product.T
    whole = Parameter((weight.float() + product).to(weight.dtype))
    if getattr(base.weight, "quant_state", None) is not None:
        linear = nn.Linear(weight.shape[1], weight.shape[0], base.bias is not None, device="meta")
        linear.weight, linear.bias = whole, base.bias
        return linear
    other: nn.Module = copy.copy(base)
    other._parameters = {**base._parameters, "weight": whole}
    return other


def dense_weight(layer: Any) -> Tensor:
    """The weight of a linear layer, of a quantised one what it stands for: `[outputs, inputs]`."""
    if getattr(layer.weight, "quant_state", None) is None:
        plain: Tensor = layer.weight.detach()
        return plain
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.to(layer.compute_dtype)  # the state's own is that of the file


def folded(layer: Any) -> Tensor | None:
    """The adapted layer's weight with the product added, where that loses nothing; else None.

    In fp32 it is the layer's own function; a weight of less precision would round the product away.
    """
    if not _has_adapter(layer) or type(layer.base_layer) is not nn.Linear:
        return None
    weight = layer.base_layer.weight
    if weight.dtype not in (torch.float32, torch.float64):
        return None
    return torch.add(weight, adapter_of(layer).product())


def _has_adapter(module: Any) -> bool:
    return hasattr(module, "base_layer") and ADAPTER in getattr(module, "lora_A", ())


def _adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if _has_adapter(module)]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
