"""Methods beside SDFT, on the same module, data and retention machinery."""

from sdft.methods.sft import SFTModule

__all__ = ["SFTModule"]
