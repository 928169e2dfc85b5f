"""What the guard has done so far, for checkpoints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Standing:
    """What the guard has done, as plain values.

    Attributes:
        lr_factor: What all learning rates have been multiplied by.
        frozen: Whether the teacher stands still for the rest of the stage.
        alarmed: Whether the stage has had an alarm.
        in_a_row: Steps skipped since the last one that was made.
        skipped: Steps skipped in the run.
        alarms: Alarms of the run.
    """

    lr_factor: float = 1.0
    frozen: bool = False
    alarmed: bool = False
    in_a_row: int = 0
    skipped: int = 0
    alarms: int = 0

    def begin_stage(self) -> None:
        """A stage begins: its teacher moves again."""
        self.frozen = self.alarmed = False
