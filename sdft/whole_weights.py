"""A model's weights as a checkpoint holds them, one after another, for an engine with its own copy.

Whole where they are sharded, dense where they are quantised, with the adapters merged in; the model
itself is left alone: merging in place and taking it back would round its weights at every step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

Named = tuple[str, Tensor]
_QUANTISED = ("Params4bit", "Int8Params")  # of bitsandbytes
# In 64-bit sums no bit of these is lost: a sign that flips everywhere must not cancel out.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


@torch.no_grad()
def whole_weights(model: PreTrainedModel) -> Iterator[Named]:
    """Names and weights under the names of a checkpoint; a tied weight comes once.

    Raises:
        ValueError: An adapter that cannot be merged.
    """
    pairs = _walk(model, "", set())
    if _is_stored_otherwise(model):
        yield from revert_weight_conversion(model, dict(pairs)).items()
    else:
        yield from pairs


def fingerprint(weights: Iterable[Named]) -> list[int]:
    """Numbers that change with any weight, read from its bits.

    The version counters of tensors would be cheaper, but fused optimizers, bitsandbytes and whoever
    writes to `.data` leave them as they are.
    """
    sums = [_bit_sum(weight) for _, weight in weights]
    return [] if not sums else [int(value) for value in torch.stack(sums).tolist()]


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether `whole_weights` leaves out the output embedding, because the input's is the same."""
    head = model.get_output_embeddings()
    names = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    return not names & {name for name, _ in whole_weights(model)}


def _bit_sum(weight: Tensor) -> Tensor:
    """A sum of the bits, modulo 2^64, in which every row and every column counts differently."""
    bits_RC = weight.detach().contiguous().view(_BITS[weight.element_size()])
    bits_RC = bits_RC.reshape(len(bits_RC) if bits_RC.dim() else 1, -1)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for sums in (bits_RC.sum(0, dtype=torch.int64), bits_RC.sum(1, dtype=torch.int64)):
        places = torch.arange(1, 2 * len(sums), 2, device=weight.device)
        total = total * 31 + (sums * places).sum()
    return total.cpu()


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[Named]:
    if hasattr(module, "modules_to_save"):  # peft's wrapper of a module that is trained as a whole
        yield from _walk(_trained(module), prefix, seen)
        return
    if hasattr(module, "get_base_layer"):  # peft's wrapper of a layer with adapters
        for name, weight in _merged(module, prefix).items():
            yield prefix + name, weight
        return
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield prefix + name, _dense(module, name, parameter)
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.", seen)


def _trained(wrapper: Any) -> nn.Module:
    active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    plain: nn.Module = wrapper.original_module
    return wrapper.modules_to_save[active[0]] if active and not wrapper.disable_adapters else plain


def _merged(layer: Any, prefix: str) -> dict[str, Tensor]:
    """The weights of the layer below the adapters, with the active ones added."""
    base = layer.get_base_layer()
    adapters = [name for name in layer.active_adapters if name not in layer.merged_adapters]
    if layer.disable_adapters or not adapters:
        return _own(base)
    if type(base.weight).__name__ not in _QUANTISED:
        merged = copy.deepcopy(layer)
        merged.merge(adapter_names=adapters)
        return _own(merged.get_base_layer())
    weights = _own(base)
    for name in adapters:
        if name in getattr(layer, "lora_variant", {}) or not hasattr(layer, "get_delta_weight"):
            raise ValueError(
                f"the adapter {name!r} of {prefix.rstrip('.')} cannot be merged into quantised "
                "weights: plain LoRA can"
            )
        if name in layer.lora_A:
            weights["weight"] = weights["weight"] + layer.get_delta_weight(name)
    return weights


def _own(module: nn.Module) -> dict[str, Tensor]:
    own = module.named_parameters(recurse=False)
    return {name: _dense(module, name, parameter) for name, parameter in own}


def _dense(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()  # on every rank, in the same order
    if name == "weight" and type(parameter).__name__ in _QUANTISED:
        from peft.utils.integrations import dequantize_module_weight

        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            module.state_dict()  # bitsandbytes unpacks what its kernels for the CPU had packed
        return dequantize_module_weight(module).detach()
    return parameter.detach()


def _is_stored_otherwise(model: PreTrainedModel) -> bool:
    """Whether transformers reads this model's checkpoints under other names (fused experts)."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    if getattr(model, "_weight_conversions", None):
        return True
    return bool(get_model_conversion_mapping(model, add_legacy=False))
