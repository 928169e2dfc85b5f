"""Where the time of a step goes, on one GPU or many: arithmetic, memory traffic, communication.

The lines add up to the step. Communication that can run beside arithmetic is counted only as far as
it takes longer; what nothing can hide (`sdft.communication`) is counted whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sdft.budget import Device, StepTime, Storage, Workload, step_time
from sdft.communication import Collective, Network, collectives
from sdft.shapes import ModelShape

Share = Literal["generate", "score", "update"]


@dataclass(frozen=True)
class TimeLine:
    """One line of a step's time.

    Attributes:
        name: What is done.
        share: Of which phase.
        seconds: What the step grows by.
        formula: Of the seconds, or of what is sent.
        hidden: Seconds more that run beside other work.
    """

    name: str
    share: Share
    seconds: float
    formula: str
    hidden: float = 0.0


_WORK: dict[str, tuple[Share, str]] = {
    "decode": ("generate", "Σt max((2P + B·(Tp+t)·kv)/BW, 2P·B/F) / MBU"),
    "prefill": ("generate", "2P·B·Tp / (F·MFU)"),
    "teacher": ("score", "2P·B·(Tp+Td+Tc) / (F·MFU)"),
    "student": ("update", "8P·B·(Tp+Tc) / (F·MFU)"),
    "optimizer": ("update", "30·P / (G·BW)"),
    "average": ("update", "14·P / (G·BW)"),
}
_SENT: dict[str, Share] = {
    "rollout": "generate",
    "teacher": "score",
    "student": "update",
    "clipping": "update",
}


def passes_of(work: Workload, keep: Storage) -> int:
    """Forward and backward passes of a GPU in one optimizer step, m."""
    return math.ceil(math.ceil(work.batch / keep.gpus) / work.micro_batch)


def time_lines(
    shape: ModelShape, work: Workload, keep: Storage, device: Device, network: Network
) -> list[TimeLine]:
    """The lines of a step's time, each with its formula; without communication on one GPU."""
    parts = step_time(shape, work, keep, device).parts
    lines = [TimeLine(name, share, parts[name], text) for name, (share, text) in _WORK.items()]
    if not keep.checkpointing:
        lines = [replace(line, formula=line.formula.replace("8P", "6P")) for line in lines]
    if keep.gpus == 1:
        return lines
    sent = collectives(shape, passes_of(work, keep))
    return lines + [
        _sent_line(phase, [c for c in sent if c.phase == phase], parts, keep.gpus, network)
        for phase in _SENT
    ]


def _sent_line(
    phase: str,
    sent: Sequence[Collective],
    parts: Mapping[str, float],
    gpus: int,
    network: Network,
) -> TimeLine:
    whole = sum(network.seconds(c.kind, c.calls, c.size, gpus) for c in sent)
    bare = sum(network.seconds(c.kind, c.exposed_calls, c.exposed_size, gpus) for c in sent)
    beside = parts.get(phase, 0.0)
    seconds = bare + max(0.0, whole - bare - beside)
    formula = "; ".join(f"{c.kind}: {c.formula}" for c in sent)
    return TimeLine(f"communication: {phase}", _SENT[phase], seconds, formula, whole - seconds)


def total_time(lines: Sequence[TimeLine]) -> StepTime:
    """Seconds by phase, communication included, and of an SFT step on the same tokens."""
    by_phase = {
        share: sum(line.seconds for line in lines if line.share == share)
        for share in ("generate", "score", "update")
    }
    average = sum(line.seconds for line in lines if line.name == "average")
    return StepTime(
        **by_phase,
        sft=by_phase["update"] - average,
        parts={line.name: line.seconds for line in lines},
    )


def bottleneck(lines: Sequence[TimeLine]) -> TimeLine:
    """What takes longest."""
    return max(lines, key=lambda line: line.seconds)
