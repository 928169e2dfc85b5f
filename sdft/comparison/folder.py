"""One run on disk: what it was to compute, whether it is finished, why it failed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import yaml

from sdft import __version__
from sdft.atomic import atomic_write
from sdft.comparison.settings import Settings, changes, fingerprint

State = Literal["new", "unfinished", "finished", "changed"]
LOG_LINES = 15
"""Lines of a failed run's log that reports show."""


class RunFolder:
    """The folder of a run.

    It belongs to the configuration in its `run.yaml`. `finished.json` marks a run that ended well,
    with the fingerprint of that configuration; `failed.json` one that did not.

    Args:
        path: The folder, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_file = path / "run.yaml"
        self.finished_file = path / "finished.json"
        self.failed_file = path / "failed.json"
        self.log = path / "log.txt"
        self.checkpoint = path / "checkpoints" / "last.ckpt"

    # ---------------------------------------------------------------- what there is

    def settings(self) -> Settings | None:
        """The configuration that the folder belongs to."""
        try:
            found = yaml.safe_load(self.settings_file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            return None
        return found if isinstance(found, dict) else None

    def state(self, wanted: Settings) -> State:
        """How far the run with this configuration is."""
        if not self.path.exists():
            return "new"
        own = self.settings()
        if own is None or fingerprint(own) != fingerprint(wanted):
            return "changed"
        mark = self.mark()
        whole = mark is not None and mark.get("fingerprint") == fingerprint(wanted)
        return "finished" if whole and self.shortfall() is None else "unfinished"

    def differences(self, wanted: Settings) -> list[str]:
        """What differs between the folder's configuration and this one."""
        own = self.settings()
        return ["there is no run.yaml"] if own is None else changes(own, wanted)

    def mark(self) -> dict[str, Any] | None:
        """What `finish` left; None when the run is not finished."""
        return read_json(self.finished_file)

    def failure(self) -> dict[str, Any] | None:
        """What `fail` left; None when the run did not fail."""
        return read_json(self.failed_file)

    def shortfall(self) -> str | None:
        """What the retention report lacks; None when it is whole."""
        report = read_json(self.path / "retention.json")
        if report is None:
            return "there is no readable retention.json"
        stages = len(report.get("tasks", []))
        limit = ((self.settings() or {}).get("trainer") or {}).get("max_epochs")
        if limit not in (None, -1):
            stages = min(stages, limit)
        rows, wanted = len(report.get("matrix", [])), stages + 1
        return None if rows == wanted else f"retention.json has {rows} rows of {wanted}"

    # ---------------------------------------------------------------- what happens to it

    def set_aside(self) -> Path:
        """Rename the folder, so that its name is free; returns its new place."""
        number = 1
        while (place := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(place)
        return place

    def prepare(self, settings: Settings) -> bool:
        """Make the folder ready for its run; returns whether there is a checkpoint to go on from.

        Without one the folder is emptied: what a killed attempt left would mix with the new run's.
        """
        resume = self.checkpoint.is_file()
        if self.path.exists() and not resume:
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        for file in (self.finished_file, self.failed_file):
            file.unlink(missing_ok=True)
        with atomic_write(self.settings_file) as file:
            head = f"# python -m sdft fit --config {self.settings_file}\n"
            body = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
            file.write_text(head + body, encoding="utf-8")
        return resume

    def finish(self, settings: Settings, seconds: float, resumed: bool, keep: bool) -> None:
        """Mark the run as finished, and delete its checkpoints unless they are kept."""
        content = {
            "fingerprint": fingerprint(settings),
            "seconds": round(seconds, 2),
            "resumed": resumed,  # the seconds are the last attempt's
            "version": __version__,
        }
        write_json(self.finished_file, content)
        if not keep:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def fail(self, reason: str, resumed: bool) -> None:
        """Mark the run as failed; one that failed after being resumed starts afresh next time."""
        write_json(self.failed_file, {"reason": reason, "log": self.last_lines()})
        if resumed:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def last_lines(self) -> list[str]:
        """The end of the run's log."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        return [line for line in lines if line.strip()][-LOG_LINES:]


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None when there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object atomically; it has no NaN."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as file:
        file.write_text(text + "\n", encoding="utf-8")
