"""Flash attention of packed sequences, as torch ships it or as a flash-attn package brings it.

Which one is there, what it can do, and how it is called; `sdft.attention` chooses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sdft.segments import HALVES, QKV, AttentionSettings, Segments

PACKAGES = {  # where `flash_attn_varlen_func` stands in flash-attn 3, 2 and 4
    "flash_attn_interface": "flash-attn 3",
    "flash_attn": "flash-attn 2",
    "flash_attn.cute": "flash-attn 4",
}
WIDEST_HEAD = 256
OLDEST_DEVICE = (8, 0)  # Ampere


@dataclass(frozen=True)
class Kernel:
    """One implementation of flash attention over packed sequences.

    Attributes:
        name: What the log says.
        function: Takes `[N, heads, width]` queries, keys and values.
        parameters: The names of its arguments.
    """

    name: str
    function: Callable[..., Any]
    parameters: frozenset[str]

    @classmethod
    def of(cls, name: str, function: Callable[..., Any]) -> Kernel:
        """The kernel behind a function, by its signature."""
        return cls(name, function, frozenset(inspect.signature(function).parameters))

    def can(self, settings: AttentionSettings) -> bool:
        """Whether its arguments express all that a layer asks for."""
        return (
            (settings.softcap is None or "softcap" in self.parameters)
            and (settings.dropout == 0 or "dropout_p" in self.parameters)
            and (settings.window is None or "window_size" in self.parameters)
        )

    def __call__(self, qkv: QKV, segments: Segments, settings: AttentionSettings) -> Tensor:
        """Causal attention inside each segment (see `segment_attention`)."""
        arguments = self._arguments(segments, settings)
        if "enable_gqa" in self.parameters:
            arguments["enable_gqa"] = qkv.shared
        elif "causal" not in self.parameters:  # torch 2.11; flash-attn shares key heads unasked
            qkv = qkv.repeated()
        output = self.function(*qkv, **arguments)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first

    def _arguments(self, segments: Segments, settings: AttentionSettings) -> dict[str, Any]:
        """By name, in torch's words and in flash-attn's; only what the function takes."""
        starts, longest = segments.starts, segments.longest
        arguments = {
            **dict.fromkeys(("cu_seq_q", "cu_seq_k", "cu_seqlens_q", "cu_seqlens_k"), starts),
            **dict.fromkeys(("max_q", "max_k", "max_seqlen_q", "max_seqlen_k"), longest),
            **dict.fromkeys(("scale", "softmax_scale"), settings.scaling),
            "causal": True,
        }
        # Both count the tokens to the left of the query; torch takes (-1, 0) for plain causality.
        if settings.window is not None and settings.windowed(longest):
            arguments["window_size"] = (settings.window - 1, 0)
        elif "causal" not in self.parameters:
            arguments["window_size"] = (-1, 0)
        if settings.softcap is not None:
            arguments["softcap"] = settings.softcap
        if settings.dropout > 0:
            arguments["dropout_p"] = settings.dropout
        return {name: value for name, value in arguments.items() if name in self.parameters}


@cache
def kernels() -> list[Kernel]:
    """What is installed, the preferred one first."""
    found = [_torch_kernel(), *(_package_kernel(module) for module in PACKAGES)]
    return [kernel for kernel in found if kernel is not None]


def _torch_kernel() -> Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    kernel = Kernel.of("torch's varlen_attn", varlen_attn)
    return kernel if {"window_size", "scale"} <= kernel.parameters else None  # not in torch 2.10


def _package_kernel(module: str) -> Kernel | None:
    try:
        function = import_module(module).flash_attn_varlen_func
    except (ImportError, AttributeError, OSError):  # OSError: built for another CUDA
        return None
    return Kernel.of(PACKAGES[module], function)


def half_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """The half precision in which attention runs here, autocast's included; None: in none."""
    if dtype in HALVES:
        return dtype
    if torch.is_autocast_enabled(device.type):
        autocast = torch.get_autocast_dtype(device.type)
        return autocast if autocast in HALVES and dtype == torch.float32 else None
    return None


def takes(qkv: QKV) -> bool:
    """Whether flash attention's kernels run on this device with heads of this width."""
    device, width = qkv.query.device, qkv.query.shape[-1]
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= OLDEST_DEVICE
        and width == qkv.value.shape[-1]
        and width % 8 == 0
        and width <= WIDEST_HEAD
    )
