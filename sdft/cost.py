"""What a run costs, phase by phase: seconds, tokens, FLOPs and peak memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

PHASES = ("prepare", "generate", "score", "update", "evaluate", "track")
"""Generation before training, the three parts of a step, measuring, and watching the training."""

TRAINING = ("prepare", "generate", "score", "update")
"""The phases without which nothing would be learnt."""


@dataclass
class PhaseCost:
    """What one phase has cost.

    Attributes:
        seconds: Wall-clock time.
        tokens: Tokens that went through a model, padding left out; a token that goes through two
            models counts twice.
        flops: Estimated floating-point operations of the passes (`sdft.flops`).
        peak_memory_bytes: Most memory of all its occurrences, 0 when not measured.
    """

    seconds: float = 0.0
    tokens: int = 0
    flops: int = 0
    peak_memory_bytes: int = 0

    def add(self, other: PhaseCost) -> None:
        """Add another occurrence."""
        self.seconds += other.seconds
        self.tokens += other.tokens
        self.flops += other.flops
        self.peak_memory_bytes = max(self.peak_memory_bytes, other.peak_memory_bytes)

    @property
    def tokens_per_second(self) -> float | None:
        """None for a phase that has no tokens or took no time."""
        return self.tokens / self.seconds if self.tokens and self.seconds > 0 else None


class Ledger:
    """The cost of every phase so far.

    Attributes:
        phases: Names and costs, in the order in which they first ran.
    """

    def __init__(self) -> None:
        self.phases: dict[str, PhaseCost] = {}

    def __getitem__(self, phase: str) -> PhaseCost:
        """The cost of a phase, zero when it has not run; not to be changed."""
        return self.phases.get(phase, PhaseCost())

    def add(self, phase: str, cost: PhaseCost) -> None:
        """Enter an occurrence of a phase, or a part of one."""
        self.phases.setdefault(phase, PhaseCost()).add(cost)

    @classmethod
    def joined(cls, ledgers: Sequence[Ledger]) -> Ledger:
        """The ledger of processes that work side by side: tokens and FLOPs of all together.

        Seconds are those of the slowest process, and memory is that of the one that took most.
        """
        joined = cls()
        for name in dict.fromkeys(name for ledger in ledgers for name in ledger.phases):
            costs = [ledger[name] for ledger in ledgers]
            cost = PhaseCost(seconds=max(cost.seconds for cost in costs))
            for other in costs:
                cost.add(replace(other, seconds=0.0))
            joined.add(name, cost)
        return joined

    def total(self, phases: Iterable[str] | None = None) -> PhaseCost:
        """The sum over some phases, or over all; of memory the largest."""
        total = PhaseCost()
        for phase in self.phases if phases is None else phases:
            total.add(self[phase])
        return total

    def scalars(self) -> dict[str, float]:
        """`seconds/PHASE`, and `tokens_per_second/PHASE` where there were tokens."""
        values = {f"seconds/{phase}": cost.seconds for phase, cost in self.phases.items()}
        speeds = {phase: cost.tokens_per_second for phase, cost in self.phases.items()}
        return values | {f"tokens_per_second/{p}": s for p, s in speeds.items() if s is not None}

    def to_dict(self) -> dict[str, Any]:
        """`phases`, `training` and `total` as in `cost.json`.

        The phases of `PHASES` are all there, with zeros where a run has none of it. `training` sums
        what a method needs in order to learn; `total` sums everything.
        """
        names = [*PHASES, *(name for name in self.phases if name not in PHASES)]
        training, total = self.total(TRAINING), self.total()
        return {
            "phases": {name: _phase_dict(self[name]) for name in names},
            "training": {key: getattr(training, key) for key in ("seconds", "tokens", "flops")},
            "total": {"seconds": total.seconds, "flops": total.flops},
        }

    def state_dict(self) -> dict[str, dict[str, float]]:
        """All costs as plain numbers."""
        return {phase: asdict(cost) for phase, cost in self.phases.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the costs of a state: those of a run that goes on."""
        for phase, cost in state.items():
            self.add(phase, PhaseCost(**cost))


def _phase_dict(cost: PhaseCost) -> dict[str, float | None]:
    return {
        "seconds": cost.seconds,
        "tokens": cost.tokens,
        "tokens_per_second": cost.tokens_per_second,
        "flops": cost.flops,
        "peak_memory_bytes": cost.peak_memory_bytes or None,
    }
