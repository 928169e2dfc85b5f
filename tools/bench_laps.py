"""Figures of a benchmark's steps: memory, medians, ratios, exponents. Nothing is timed here.

Imported in other environments, too: nothing here needs sdft.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")

PHASES = ("generate", "score", "update")


@dataclass(frozen=True)
class Lap:
    """One step of one contender.

    Attributes:
        seconds: Of the whole step.
        phases: Seconds of each phase.
        flops: Estimated floating-point operations of each phase (`sdft.flops`).
        prompts: Tokens of each prompt that was answered.
        completions: Tokens of each completion.
        held: Bytes before the step: resident on a CPU, allocated on CUDA; 0 where nobody tells.
        peak: Most bytes during it; where the system does not let one begin anew, until its end.
    """

    seconds: float
    phases: dict[str, float] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    prompts: list[int] = field(default_factory=list)
    completions: list[int] = field(default_factory=list)
    held: int = 0
    peak: int = 0


def summary(laps: Sequence[Lap]) -> dict[str, Any]:
    """Medians of seconds, of the phases' seconds and of completion tokens; memory."""
    return {
        "seconds": statistics.median(lap.seconds for lap in laps),
        "all_seconds": [lap.seconds for lap in laps],
        "phases": medians([lap.phases for lap in laps]),
        "completion_tokens": statistics.median(sum(lap.completions) for lap in laps) or None,
        "peak_memory_bytes": max(lap.peak for lap in laps),
        "held_memory_bytes": laps[0].held,
    }


def medians(values: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each phase that some step had; 0 where one had none of it."""
    return {
        phase: statistics.median(value.get(phase, 0.0) for value in values)
        for phase in PHASES
        if any(phase in value for value in values)
    }


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """What `bench_step` is about: medians over pairs of steps; None where one did not run."""

    def over(first: str, second: str) -> float | None:
        if first not in results or second not in results:
            return None
        pairs = zip(results[first]["all_seconds"], results[second]["all_seconds"], strict=True)
        return float(statistics.median(a / b for a, b in pairs))

    return {
        "sdft_over_sft": over("ours", "sft"),
        "generate_over_ours": over("generate", "ours"),
        "trl_over_ours": over("trl", "ours"),
    }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """p of the least-squares fit of log values to p · log sizes + c.

    None for fewer than two sizes, or a value that has no logarithm.
    """
    if len(set(sizes)) < 2 or min(values) <= 0:
        return None
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in values]
    x, y = statistics.fmean(xs), statistics.fmean(ys)
    across = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return across / sum((a - x) ** 2 for a in xs)


def interaction(value: Callable[[bool, bool], float]) -> float:
    """What two sizes grown together add to what each adds alone.

    Args:
        value: Of neither, one or both of the sizes grown.
    """
    return value(True, True) - value(True, False) - value(False, True) + value(False, False)


# ---------------------------------------------------------------- memory of this process


def held_memory() -> int:
    """Bytes: allocated on CUDA, else resident; 0 where the system hides it."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if _STATM.exists() else 0


def forget_peak() -> None:
    """Begin the peak anew, where the system lets one; else it is that of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_memory() -> int:
    """Most bytes since then: allocated on CUDA, else resident; 0 where the system hides it."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = _STATUS.read_text() if _STATUS.exists() else ""
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
