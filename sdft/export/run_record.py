"""What is known about the run that a checkpoint comes from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sdft.checkpoint_reader import Checkpoint
from sdft.metrics import Cell
from sdft.redaction import redacted
from sdft.report import RetentionReport

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """A run, as far as its checkpoint and the files beside that tell.

    Attributes:
        checkpoint: The checkpoint.
        config: The run's configuration without secrets; None when it is not there.
        report: What was measured up to the checkpoint; None when nothing was.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any] | None
    report: RetentionReport | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> RunRecord:
        """Read what lies beside a checkpoint; what belongs to another run is left out."""
        config = _find_config(checkpoint)
        return cls(checkpoint, config, _find_report(checkpoint, config))

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the checkpoint says of its model and method."""
        identity: Mapping[str, Any] = self.checkpoint.facts["sdft"]
        return identity

    @property
    def base_model(self) -> str:
        """The name of the model that the run began with."""
        return str(self.identity["model"])

    @property
    def method(self) -> str:
        """The method, with its mixtures and penalty where they are known."""
        if self.report is not None:
            return self.report.method
        return _method_of(self.identity)

    @property
    def seed(self) -> int | None:
        """The run's seed."""
        given = self.report.seed if self.report is not None else None
        if given is None and self.config is not None:
            given = self.config.get("seed_everything")
        return given if isinstance(given, int) and not isinstance(given, bool) else None

    @property
    def step(self) -> int:
        """Optimizer steps that the weights have taken."""
        return int(self.checkpoint.facts.get("global_step", 0))

    @property
    def tasks(self) -> list[str]:
        """The tasks in their order of training."""
        return _data_state(self.checkpoint)["tasks"]

    @property
    def steps_since_measured(self) -> int | None:
        """Optimizer steps between the last row of the report and the weights, where known."""
        steps = (_retention_state(self.checkpoint) or {}).get("steps") or [None]
        return None if steps[-1] is None else self.step - int(steps[-1])

    def setting(self, *path: str) -> Any:
        """A value of the configuration, through `init_args`; None where there is none."""
        value: Any = self.config
        for part in path:
            if isinstance(value, Mapping) and part not in value:
                value = value.get("init_args")
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def place(self) -> str:
        """The checkpoint's path within its run."""
        parts = self.checkpoint.path.resolve().parts
        return "/".join(parts[-3:] if "checkpoints" in parts[-2:] else parts[-1:])


def _method_of(identity: Mapping[str, Any]) -> str:
    return "+".join(part for part in (identity.get("method"), identity.get("penalty")) if part)


def _folders(checkpoint: Checkpoint) -> Iterator[Path]:
    path = checkpoint.path.resolve()
    yield from (path.parent, path.parent.parent)


def _find_config(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    name = checkpoint.facts["sdft"].get("model")
    for folder in _folders(checkpoint):
        try:
            found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, yaml.YAMLError) as error:
            log.warning("%s cannot be read: %s", folder / "config.yaml", error)
            continue
        record = RunRecord(checkpoint, found if isinstance(found, dict) else {}, None)
        if record.setting("model", "model_name") == name:
            return dict(redacted(found))
        log.warning("%s is of another model than %r: left out", folder / "config.yaml", name)
    return None


def _data_state(checkpoint: Checkpoint) -> dict[str, list[str]]:
    for value in checkpoint.facts.values():
        if isinstance(value, dict) and isinstance(value.get("tasks"), list):
            return value
    return {"tasks": []}


def _retention_state(checkpoint: Checkpoint) -> dict[str, Any] | None:
    for key, state in checkpoint.facts.get("callbacks", {}).items():
        if "Retention" in key and isinstance(state, dict) and state.get("rows"):
            return state
    return None


def _find_report(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None
) -> RetentionReport | None:
    """The rows in the checkpoint, which are those of its moment; else the run's own report."""
    tasks = _data_state(checkpoint)["tasks"]
    beside = _read_report(checkpoint, tasks)
    state = _retention_state(checkpoint)
    if state is None:
        return beside
    rows = [[Cell.from_dict(cell) for cell in row] for row in state["rows"]]
    suites = _data_state(checkpoint).get("suites")
    if suites is None and beside is not None and len(beside.columns) == len(rows[0]):
        suites = beside.suites
    if suites is None:  # checkpoints of older versions do not name them
        suites = [f"suite {number + 1}" for number in range(len(rows[0]) - len(tasks))]
    seed = beside.seed if beside is not None else (config or {}).get("seed_everything")
    method = beside.method if beside is not None else _method_of(checkpoint.facts["sdft"])
    report = RetentionReport(tasks, suites, seed, method, routed=bool(beside and beside.routed))
    for row in rows:
        report.add_row(row)
    return report


def _read_report(checkpoint: Checkpoint, tasks: list[str]) -> RetentionReport | None:
    for folder in _folders(checkpoint):
        try:
            report = RetentionReport.load(folder)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            log.warning("%s", error)
            continue
        if report.tasks == tasks:
            return report
        log.warning("%s is of another task sequence: left out", folder / "retention.json")
    return None
