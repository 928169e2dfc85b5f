"""The model card: where a model comes from, what was measured, and what is not known."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from sdft import __version__
from sdft.export.run_record import RunRecord
from sdft.metrics import METRICS, Cell
from sdft.redaction import redacted, redacted_text
from sdft.report import ROUTED, RetentionReport

LIBRARIES = ("torch", "transformers", "lightning", "safetensors")


@dataclass(frozen=True)
class ModelCard:
    """The card of an exported folder, as text (`README.md`) and as values (`sdft.json`).

    Attributes:
        record: The run.
        which: `student` or `teacher`.
        dtype: Of the weights in the folder.
        converted: Whether that is another than in the checkpoint.
        sha256: Of the checkpoint.
        base_model: The base that the folder was made with.
        plain_template: Whether the base brought no chat template of its own.
    """

    record: RunRecord
    which: str
    dtype: str
    converted: bool
    sha256: str
    base_model: str
    plain_template: bool = False

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        record = self.record
        return redacted(  # type: ignore[no-any-return]
            {
                "which": self.which,
                "dtype": self.dtype,
                "base_model": self.base_model,
                "method": record.method,
                "seed": record.seed,
                "tasks": record.tasks,
                "checkpoint": {
                    "path": record.place(),
                    "sha256": self.sha256,
                    "step": record.step,
                    "steps_since_measured": record.steps_since_measured,
                },
                "exported_with": _versions(),
                "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "trained_with": {"lightning": self._trained_with},
                "retention": None if record.report is None else record.report.to_dict(),
                "config": record.config,
            }
        )

    def text(self) -> str:
        """The card in Markdown, with the front matter that the hub reads."""
        parts = [
            self._front_matter(),
            f"# {self._title()}",
            self._summary(),
            "## What was learnt and what was kept",
            self._retention(),
            "## Use",
            _USE,
            "## Limits",
            "\n".join(f"- {limit}" for limit in self._limits()),
            "## Provenance",
            self._provenance(),
            "## Training configuration",
            self._configuration(),
        ]
        return redacted_text("\n\n".join(parts)) + "\n"

    # ---------------------------------------------------------------- parts

    @property
    def _trained_with(self) -> str:
        return str(self.record.checkpoint.facts.get("pytorch-lightning_version", "unknown"))

    def _front_matter(self) -> str:
        values: dict[str, Any] = {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["sdft", "self-distillation", "continual-learning"],
        }
        if _on_hub(self.base_model):
            values["base_model"] = self.base_model
        return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"

    def _title(self) -> str:
        name = self.base_model.rstrip("/").split("/")[-1]
        return f"{name}, {self.record.method}, {len(self.record.tasks)} tasks ({self.which})"

    def _summary(self) -> str:
        who = "The student"
        if self.which == "teacher":
            kind = self.record.setting("teacher", "kind") or "averaged"
            who = f"The teacher ({'moving average' if kind == 'ema' else kind})"
        tasks = ", ".join(self.record.tasks) or "unknown tasks"
        return (
            f"{who} of a run of the method `{self.record.method}` that began with "
            f"`{self.base_model}`, after {self.record.step} optimizer steps. The run's tasks, in "
            f"this order: {tasks}. An ordinary Hugging Face folder: weights (safetensors, "
            f"{self.dtype}), configuration, tokenizer with chat template, generation "
            "configuration. `sdft.json` holds this card's facts as values."
        )

    def _retention(self) -> str:
        report = self.record.report
        return "Nothing was measured in this run." if report is None else retention_text(report)

    def _limits(self) -> list[str]:
        limits = list(self._limits_of_table())
        if self.converted:
            limits.append(
                f"The weights were converted to {self.dtype} on export, after everything was "
                "measured."
            )
        if self.plain_template:
            limits.append(
                "The base model brings no chat template; the run used a plain `User: … "
                "Assistant:` form, which the tokenizer here carries."
            )
        if options := self.record.setting("model", "chat_template_kwargs"):
            limits.append(f"Prompts were made with these chat template options: `{options}`.")
        if thinking := self.record.setting("model", "thinking"):
            limits.append(f"Thinking, its markers and what was scored of it: `{thinking}`.")
        return [
            *limits,
            "What the table does not show was not measured: other abilities, languages, safety, "
            "bias. The base model's own limits and licence apply.",
        ]

    def _limits_of_table(self) -> list[str]:
        if self.record.report is None:
            return ["No score is known: neither of the skills nor of what was kept."]
        limits = []
        if self.which == "teacher":
            limits.append("The table was measured on the student, not on the teacher in here.")
        since = self.record.steps_since_measured
        if since is None:
            limits.append("Whether the table was measured on exactly these weights is not known.")
        elif since > 0:
            limits.append(
                f"The weights have taken {since} optimizer steps since the table's last row."
            )
        if self.record.report.routed:
            limits.append(f"The table shows {ROUTED}; this folder holds the newest one alone.")
        return limits

    def _provenance(self) -> str:
        seed = "unknown" if self.record.seed is None else str(self.record.seed)
        rows = {
            "base model": f"`{self.base_model}`",
            "method": f"`{self.record.method}`",
            "seed": seed,
            "optimizer steps": str(self.record.step),
            "checkpoint": f"`{self.record.place()}`",
            "sha256 of the checkpoint": f"`{self.sha256}`",
            "exported with": ", ".join(f"{name} {v}" for name, v in _versions().items()),
            "trained with": f"lightning {self._trained_with}",
        }
        return _table(["", ""], [[key, value] for key, value in rows.items()])

    def _configuration(self) -> str:
        if self.record.config is None:
            return "Not found beside the checkpoint."
        text = yaml.safe_dump(redacted(self.record.config), sort_keys=False, allow_unicode=True)
        fence = "`" * (3 if "```" not in text else 8)
        return f"Secrets are shown as `***`.\n\n{fence}yaml\n{text}{fence}"


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

`python -m sdft generate --model THIS_FOLDER --prompt "…"` answers with it, and
`python -m sdft fit --model.model_name THIS_FOLDER …` goes on from it."""


def retention_text(report: RetentionReport) -> str:
    """The retention matrix and its metrics in Markdown."""
    labels = [f"after {number}. {name}" for number, name in enumerate(report.row_labels[1:], 1)]
    rows = []
    for column, name in enumerate(report.columns):
        kind = f"{column + 1}. {name}" if column < len(report.tasks) else f"{name} (prior suite)"
        cells = [row[column] for row in report.rows]
        last = cells[-1]
        interval = "{:.2f}–{:.2f}".format(*last.ci95) if last.ci95 else ""
        rows.append([kind, *map(_score, cells), interval, str(last.n)])
    metrics = report.metrics()
    told = [f"{key} {_number(metrics[key])}" for key in METRICS]
    undefined = [f"{key}: {reason}" for key, reason in metrics["undefined"].items()]
    notes = [f"Undefined: {'; '.join(undefined)}."] if undefined else []
    notes += [f"The table shows {ROUTED}."] if report.routed else []
    table = _table(["", "base", *labels, "95 %", "n"], rows)
    explained = (
        "Mean scores of greedy answers, before training and after each stage; the interval is that "
        "of the last score, n the number of its examples."
    )
    return "\n\n".join([explained, table, ", ".join(told) + ".", *notes])


def _score(cell: Cell) -> str:
    return "n/a" if cell.score is None else f"{cell.score:.2f}"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _versions() -> dict[str, str]:
    found = {"sdft": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _on_hub(name: str) -> bool:
    """Whether a base's name means the same to others: paths and ours do not."""
    return not (name.startswith((".", "/", "~", "sdft:")) or name.endswith(".gguf")) and (
        name.count("/") == 1
    )
