"""What is watched, and by which rule unless the configuration has another."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sdft.guard.rules import Rule

LOGGED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "divergence": (
            "train/divergence",
            "train/loss",
            "train/distillation",
            "reinvoke/divergence",
        ),
        "entropy": ("train/entropy",),
        "length": ("train/completion_length",),
        "truncated": ("train/truncated",),
        "repetition": ("train/repetition",),
        "kl_base": ("train/kl_base_student",),
    }
)
"""Signal → the names under which methods log it; the first that a step has logged counts."""

GRADIENT = "gradient"
"""The norm of the gradient, before it is clipped."""
NONFINITE = "nonfinite"
"""Whether the loss or a gradient is no finite number: 1 or 0."""

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "divergence": Rule(ratio=3.0, noise=0.02),
        "entropy": Rule(ratio=5.0, side="both", noise=0.05, patience=2),
        "length": Rule(ratio=2.0, side="both", noise=0.5),
        "truncated": Rule(noise=0.05),
        "repetition": Rule(noise=0.03, above=0.5),
        "kl_base": Rule(noise=0.05, above=1.0, patience=2),
        GRADIENT: Rule(deviations=10.0, ratio=5.0, noise=0.05),
    }
)
"""Signal → the rule it has by default."""
