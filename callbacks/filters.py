"""Keeps the student from learning from rollouts that checks drop, and shows what was dropped."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sdft.atomic import atomic_write
from sdft.checks import AnyCheck, shown_reasons
from sdft.module import SDFTModule
from sdft.ranks import gathered, rank
from sdft.rollout_filter import CheckFilter, scorers_of
from sdft.run import is_dry, run_folder, task_stream

log = logging.getLogger(__name__)

FILE = "dropped.jsonl"
"""In the run's folder: a line per rollout that was dropped, with the reason."""


class Filters(Callback):
    """Drops rollouts that the student should not learn from: they count in no loss.

    Checks are asked once per rollout, after it was drawn (`sdft.checks`: length, repetition,
    language, regular expressions, the task's scorer or a judge, or a function of one's own). What
    they drop is a line of `dropped.jsonl` with its reason, `train/dropped` is its share, and a
    summary is printed after each stage. With checks, every process decodes its rollouts; there is
    no other cost.

    Args:
        checks: Asked in this order; the first that drops a rollout says why.
        max_records: Most rollouts per stage that are written down; the others are only counted.

    Raises:
        ValueError: A negative number; as `fit` starts: a method that draws no rollouts.
    """

    def __init__(self, checks: list[AnyCheck] | None = None, max_records: int = 1000) -> None:
        if max_records < 0:
            raise ValueError(f"filters.max_records must be 0 or more, found {max_records}")
        self.checks = list(checks or [])
        self.max_records = max_records
        self.written = 0
        self._step = 0
        self._filter: CheckFilter | None = None
        self._seen: tuple[int, dict[str, int]] = (0, {})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand between the rollouts and the loss."""
        if not self.checks:
            return
        if not isinstance(pl_module, SDFTModule):
            method = getattr(pl_module, "method", type(pl_module).__name__)
            raise ValueError(
                f"filters.checks are asked about rollouts in training, and the method {method!r} "
                "draws none: use model.checks where answers are made beforehand"
            )
        scorers = scorers_of(task_stream(trainer))
        self._filter = CheckFilter(self.checks, pl_module.scored_text, scorers)
        self._filter.seen, self._filter.reasons = self._seen[0], Counter(self._seen[1])
        pl_module.rollout_filter = self._filter

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have a resumed run write again what comes after its checkpoint."""
        file = run_folder(trainer) / FILE
        if self._filter is not None and trainer.is_global_zero and file.is_file():
            _keep_until(file, trainer.global_step)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which step the batch is a part of."""
        self._step = trainer.global_step + 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write down what this batch has lost."""
        if self._filter is None:
            return
        found = [one.to_dict() for one in self._filter.dropped]
        self._filter.dropped = []
        records = [record for part in gathered(found) for record in part]
        records = records[: max(0, self.max_records - self.written)]
        self.written += len(records)
        if not records or not trainer.is_global_zero or is_dry(trainer):
            return
        stage = trainer.current_epoch
        task = task_stream(trainer).tasks[stage].name
        head = {"step": self._step, "stage": stage, "task": task}
        path = run_folder(trainer) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(head | one, ensure_ascii=False) + "\n" for one in records)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum up the stage."""
        if self._filter is None:
            return
        parts = gathered((self._filter.seen, dict(self._filter.reasons)))
        seen = sum(part for part, _ in parts)
        reasons: Counter[str] = sum((Counter(found) for _, found in parts), Counter())
        self._filter.seen, self.written = 0, 0
        self._filter.reasons.clear()
        if not trainer.is_global_zero:
            return
        dropped, counts = reasons.total(), dict(reasons.most_common())
        why = f": {shown_reasons(counts)}" if counts else ""
        print(f"filters: {dropped} of {seen} rollouts dropped{why}")
        if dropped == seen > 0:
            log.warning("the checks dropped every rollout of the stage: nothing was learnt in it")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the run."""
        if self._filter is not None and isinstance(pl_module, SDFTModule):
            pl_module.rollout_filter = None
        self._filter = None

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """What the stage under way has counted so far, in all processes."""
        own = (0, {}) if self._filter is None else (self._filter.seen, dict(self._filter.reasons))
        parts = gathered(own) if self.checks else [own]
        reasons: Counter[str] = sum((Counter(found) for _, found in parts), Counter())
        seen = sum(part for part, _ in parts)
        return {"seen": seen, "reasons": dict(reasons), "written": self.written}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on; the first process holds what all have counted."""
        self.written = state_dict["written"]
        self._seen = (0, {}) if rank() else (state_dict["seen"], state_dict["reasons"])


def _keep_until(file: Path, step: int) -> None:
    """Drop the lines of later steps, and one that a killed run has left unfinished."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _step(line) <= step]
    if len(kept) < len(lines):
        with atomic_write(file) as new:
            new.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
