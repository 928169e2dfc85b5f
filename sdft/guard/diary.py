"""What the guard says of a step: on the console, in the logger, in `guard.jsonl`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from sdft.guard.judge import Alarm
from sdft.guard.standing import Standing
from sdft.run import is_dry, run_folder, task_stream

FILE = "guard.jsonl"
"""In the run's folder: a line of JSON per step with a new alarm, and per skipped step."""


@dataclass(frozen=True)
class Judged:
    """A step that is worth a line.

    Attributes:
        alarms: The new ones.
        signals: What was measured.
        skipped: Whether the optimizer did not step.
        done: What else was done, as plain values.
    """

    alarms: Sequence[Alarm]
    signals: Mapping[str, float]
    skipped: bool
    done: Mapping[str, Any]


def tell(trainer: Trainer, judged: Judged, standing: Standing) -> None:
    """Print, log and append; for the first process alone.

    Args:
        trainer: In the middle of the step, which its `global_step` does not count yet.
        judged: What to tell.
        standing: After the step.
    """
    step = trainer.global_step + 1
    lines = [f"guard: step {step}: {a}: {', '.join(a.actions)}" for a in judged.alarms]
    if lines:
        print("\n".join(lines))
    _log(trainer, judged.alarms, lines, standing)
    if not is_dry(trainer):
        _append(trainer, judged, step)


def _log(
    trainer: Trainer, alarms: Sequence[Alarm], lines: Sequence[str], standing: Standing
) -> None:
    if trainer.logger is None:
        return
    scalars = {f"guard/{alarm.signal}": alarm.value for alarm in alarms}
    scalars |= {"guard/skipped": standing.skipped, "guard/lr_factor": standing.lr_factor}
    trainer.logger.log_metrics(scalars, step=trainer.global_step)
    if isinstance(trainer.logger, TensorBoardLogger) and lines:
        trainer.logger.experiment.add_text("guard", "\n\n".join(lines), trainer.global_step)


def _append(trainer: Trainer, judged: Judged, step: int) -> None:
    record = {
        "step": step,
        "stage": trainer.current_epoch,
        "task": task_stream(trainer).tasks[trainer.current_epoch].name,
        "alarms": [asdict(alarm) for alarm in judged.alarms],
        "skipped": judged.skipped,
        **judged.done,
        "signals": dict(judged.signals),
    }
    path = run_folder(trainer) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """The same with text in place of the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
