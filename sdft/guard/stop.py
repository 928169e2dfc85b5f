"""How a run ends that the guard stops."""

from __future__ import annotations

from pathlib import Path


class GuardStop(RuntimeError):
    """The guard has stopped the run.

    Args:
        reason: Why.
        step: Optimizer steps that were made, skipped ones included.
        checkpoint: What was saved; None in a dry run.

    Attributes:
        checkpoint: The same.
    """

    def __init__(self, reason: str, step: int, checkpoint: Path | None) -> None:
        saved = "" if checkpoint is None else f"; saved to {checkpoint}"
        super().__init__(f"guard: stopped at step {step}: {reason}{saved}")
        self.checkpoint = checkpoint
