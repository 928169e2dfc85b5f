"""The settings that a run was started with, as its checkpoints remember them.

They are remembered to be compared, never to be used: command line and YAML win.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from lightning.pytorch import Trainer

from sdft.redaction import redacted
from sdft.run import task_stream
from sdft.seeding import run_seed

# Where files go and what is shown on the way: no part of what a run computes.
_INCIDENTAL = re.compile(
    r"(trainer\.(default_root_dir|logger|enable_|callbacks)|checkpoint\.|export\.|samples\.|"
    r"ckpt_path|weights_only|config|verbose|print_config)"
)
_NOTHING = "–"


@dataclass(frozen=True)
class Difference:
    """A setting that two runs have otherwise.

    Attributes:
        key: Its name, like `data.batch_size`.
        before: The checkpoint's value.
        now: This run's, which counts.
    """

    key: str
    before: Any
    now: Any


@dataclass(frozen=True)
class Configuration:
    """Settings by their dotted names, as plain values.

    Attributes:
        values: The settings.
        whole: Whether it has all of them, as from the command line; a run made in Python knows
            some.
    """

    values: dict[str, Any] = field(default_factory=dict)
    whole: bool = False

    @classmethod
    def of_command(cls, tree: Mapping[str, Any]) -> Configuration:
        """All settings of a command line, from its nested configuration, but no secrets."""
        found = _leaves(redacted(tree))
        leaves = {key: value for key, value in found if not _INCIDENTAL.match(key)}
        return cls(leaves, whole=True)

    @classmethod
    def of_run(cls, trainer: Trainer, command: Configuration | None = None) -> Configuration:
        """What a run knows of itself, and all that its command line says."""
        known = _known(trainer)
        if command is None:
            return cls(known)
        return cls({**known, **command.values}, command.whole)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Configuration:
        """What `to_dict` gave."""
        return cls(dict(saved["values"]), bool(saved["whole"]))

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"values": self.values, "whole": self.whole}

    def differences(self, before: Configuration) -> list[Difference]:
        """What the run that wrote the checkpoint had otherwise, in the order of this one's keys."""
        keys = list(dict.fromkeys([*self.values, *before.values]))
        if not (self.whole and before.whole):  # what one does not know is no difference
            keys = [key for key in keys if key in self.values and key in before.values]
        pairs = [
            Difference(key, before.values.get(key, _NOTHING), self.values.get(key, _NOTHING))
            for key in keys
        ]
        return [pair for pair in pairs if pair.before != pair.now]


def difference_table(differences: Sequence[Difference], most: int = 30) -> str:
    """The differences in three columns; of very many the first ones."""
    rows = [("setting", "checkpoint", "now")]
    rows += [(d.key, _brief(d.before), _brief(d.now)) for d in differences[:most]]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    left = len(differences) - most
    return "\n".join([*lines, *([f"  … and {left} more"] if left > 0 else [])])


def _known(trainer: Trainer) -> dict[str, Any]:
    data, module = task_stream(trainer), cast(Any, trainer.lightning_module)
    values: dict[str, Any] = {
        "seed_everything": run_seed(),
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.precision": str(trainer.precision),
        "model.model_name": getattr(module, "model_name", None),
    }
    for key in ("batch_size", "steps", "epochs", "shuffle", "from_base_each_task"):
        values[f"data.{key}"] = getattr(data, key)
    for task in data.tasks:
        values[f"examples of {task.name}"] = len(data.encoded(task, "train"))
    groups = getattr(getattr(module, "configured", None), "groups", [])
    if groups:
        values["model.optimizer.lr"] = groups[0]["lr"]
    return values


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a nested configuration; `init_args` are those of what stands above them."""
    if isinstance(value, Mapping | list) and value:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for part, inner in items:
            name = key if part == "init_args" else f"{key}.{part}" if key else str(part)
            yield from _leaves(inner, name)
    else:
        yield key, value if isinstance(value, bool | int | float | str | None) else str(value)


def _brief(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
