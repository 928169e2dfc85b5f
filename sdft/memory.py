"""How much memory a phase takes."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")


class MemoryMeter:
    """Reads the memory of one phase after another.

    On a GPU the most that was allocated during the phase. On a CPU the resident set when the phase
    ends, where the system tells it, and otherwise the largest resident set of the process so far.

    Args:
        device: Where the model is trained.

    Attributes:
        kind: Which of these it reads: `cuda_peak_allocated`, `resident_at_phase_end` or
            `resident_peak_so_far`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        resident = "resident_at_phase_end" if _STATM.exists() else "resident_peak_so_far"
        self.kind = "cuda_peak_allocated" if device.type == "cuda" else resident

    def begin(self) -> None:
        """A phase begins."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def end(self) -> int:
        """Bytes of the phase that ends."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        if self.kind == "resident_at_phase_end":
            return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return process_peak()


def process_peak() -> int:
    """The largest resident set of this process so far, in bytes; 0 where the system hides it."""
    if _STATUS.exists():  # `getrusage` counts what the parent held before the start, too
        found = re.search(r"^VmHWM:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource  # Unix has it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
