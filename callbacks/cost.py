"""Keeps the books: what every phase of a run has cost."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sdft.atomic import atomic_write
from sdft.cost import Ledger
from sdft.memory import MemoryMeter, process_peak
from sdft.phases import PhaseClock
from sdft.ranks import gathered, rank, ranks
from sdft.run import is_dry, run_folder, task_stream
from sdft.scorers import Judge
from sdft.student import StudentModule
from sdft.tasks import Task

log = logging.getLogger(__name__)


class CostReport(Callback):
    """Writes `<run>/cost.json`: seconds, tokens, FLOPs and peak memory of every phase.

    The phases are `prepare` (generation before training), `generate`, `score`, `update` (backward
    pass and optimizer included), `evaluate` and `track` (divergence from the base, samples).
    `training` sums the first four. Tokens leave out padding; FLOPs are estimates (`sdft.flops`);
    `memory_kind` says how memory was read; `judges` what judges were asked, since the run began or
    was resumed. Time between phases (data, checkpoints) is no phase.

    It is written after every stage, at the end, and when the run breaks off. A resumed run goes on
    from its checkpoint's numbers: what the break has lost does not count. Several processes are
    counted together: tokens and FLOPs of all, seconds and memory of the slowest and largest one;
    where such a run breaks off, the file stays as it was last.

    Args:
        enabled: Keep the books at all.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.ledger = Ledger()
        self._clock: PhaseClock | None = None

    # ---------------------------------------------------------------- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to count, before anything is loaded."""
        if not self.enabled or stage != "fit":
            return
        assert isinstance(pl_module, StudentModule)
        self.ledger = Ledger()
        self._clock = pl_module.phases
        self._clock.totals = self.ledger
        self._clock.memory = MemoryMeter(trainer.strategy.root_device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A stage has ended."""
        self._write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run has ended."""
        self._write(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The run breaks off: keep what was measured, and let the exception speak."""
        if self._clock is None or ranks() > 1:  # the others may be gone, or know nothing of it
            return
        with suppress(RuntimeError):  # a broken device cannot be waited for
            self._clock.enter("")
        if self.ledger.phases:
            try:
                self._write(trainer, pl_module)
            except OSError as error:
                log.warning("cost.json could not be written: %s", error)

    # ---------------------------------------------------------------- what

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        if self._clock is None:
            return
        content = self.to_dict(trainer, module)
        if not trainer.is_global_zero or is_dry(trainer):
            return
        path = run_folder(trainer) / "cost.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")

    def to_dict(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """The content of `cost.json`; a collective call."""
        assert isinstance(module, StudentModule)
        assert self._clock is not None
        assert self._clock.memory is not None
        ledger = Ledger.joined(gathered(self.ledger))
        values = ledger.to_dict()
        on_gpu = trainer.strategy.root_device.type == "cuda"
        peak = ledger.total().peak_memory_bytes
        if not on_gpu:  # the system's two accounts of memory lag behind one another a little
            peak = max(peak, *gathered(process_peak()))
        values["total"]["peak_memory_bytes"] = peak or None
        return {
            **values,
            **_judges(task_stream(trainer).evaluated),
            "optimizer_steps": trainer.global_step,
            "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
            "device": _device_name(trainer.strategy.root_device),
            "processes": ranks(),
            "threads": torch.get_num_threads(),
            "memory_kind": self._clock.memory.kind,
        }

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """The costs so far, the running phase's included, as plain numbers; a collective call."""
        if self._clock is not None:
            self._clock.enter(self._clock.current)
        return {"phases": Ledger.joined(gathered(self.ledger)).state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the costs of a checkpoint; one process does, for it holds those of all."""
        if rank() > 0:
            return
        self.ledger.load_state_dict(state_dict["phases"])


def _judges(tasks: Sequence[Task]) -> dict[str, Any]:
    """What the judges of tasks have cost since this process began, of all processes together."""
    own = {t.name: t.scorer.costs() for t in tasks if isinstance(t.scorer, Judge)}
    judges: dict[str, Any] = {}
    for name in own:
        found = [costs[name] for costs in gathered(own)]
        prices = [costs["price"] for costs in found if costs["price"] is not None]
        sums = {key: sum(costs[key] for costs in found) for key in found[0] if key != "price"}
        judges[name] = {**sums, "price": sum(prices) if prices else None}
    return {"judges": judges} if judges else {}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
