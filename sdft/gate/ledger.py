"""What was decided about each stage: `history.jsonl` in the run's folder."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

FILE = "history.jsonl"

Decision = Literal["accepted", "tolerated", "rejected", "rolled back"]
"""`tolerated`: something fell, and the configuration lets the run go on."""


@dataclass(frozen=True)
class Entry:
    """One decision.

    Attributes:
        decision: What was decided.
        version: The stage's name with its digest; of a stage that was broken off, without one.
        stage: From 1.
        task: The stage's.
        attempt: From 1.
        step: Optimizer steps made.
        scores: The protected columns'.
        reasons: Why, in sentences.
        follows: What the run goes on from; None where it goes on as it is, or from the start.
        time: In seconds since 1970.
    """

    decision: Decision
    version: str
    stage: int
    task: str
    attempt: int
    step: int
    scores: dict[str, float | None] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    follows: str | None = None
    time: float = 0.0

    def append_to(self, run: Path) -> None:
        """Write a line into a run's ledger."""
        run.mkdir(parents=True, exist_ok=True)
        with (run / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self), ensure_ascii=False) + "\n")


def read_ledger(run: Path) -> list[Entry]:
    """A run's decisions in their order; what a killed run left unfinished is skipped."""
    try:
        lines = (run / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [entry for line in lines if (entry := _entry(line, run)) is not None]


def _entry(line: str, run: Path) -> Entry | None:
    try:
        values: dict[str, Any] = json.loads(line)
        return Entry(**values)
    except (ValueError, TypeError):
        log.warning("%s: a line is no decision: %r", run / FILE, line[:80])
        return None
