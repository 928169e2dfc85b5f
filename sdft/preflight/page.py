"""The report to look at: one HTML file that needs nothing beside it."""

from __future__ import annotations

import platform
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from sdft import __version__
from sdft.metrics import Estimate
from sdft.preflight.facts import TaskFacts
from sdft.preflight.gap import INTERVALS
from sdft.preflight.report import Report
from sdft.preflight.verdict import Verdict
from sdft.preflight.wording import (
    LENGTH_HEADS,
    WHOSE,
    dropped,
    gap_text,
    length_cells,
    memory_line,
    nats,
    share,
    size,
    time_lines,
    token_line,
)


def page(report: Report) -> str:
    """The report as HTML; all text is escaped."""
    environment = Environment(
        loader=PackageLoader("sdft.preflight", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    first, *others = time_lines(report.estimate)
    return environment.get_template("page.html").render(
        report=report,
        tasks=[_task(facts, verdict) for facts, verdict in report.pairs],
        length_heads=LENGTH_HEADS,
        intervals=INTERVALS,
        time=first,
        times=others,
        tokens=token_line(report.estimate),
        memory=memory_line(report.estimate),
        lines=[(line.name, size(line.size), line.phase, line.formula) for line in _memory(report)],
        environment=(
            f"sdft {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
            f"{platform.machine()}"
        ),
    )


def _memory(report: Report) -> list[Any]:
    return report.estimate.footprint.lines


def _task(facts: TaskFacts, verdict: Verdict) -> dict[str, Any]:
    why = facts.missing.get("accuracy_with", "")
    alignment = facts.alignment
    return {
        "name": facts.name,
        "grade": verdict.grade,
        "reasons": verdict.reasons,
        "problem": facts.problem,
        "rows": _rows(facts, why),
        "bars": _bars(facts),
        "lengths": [
            (name, length_cells(facts.lengths[key]))
            for key, name in WHOSE.items()
            if key in facts.lengths
        ],
        "limit": facts.limit,
        "problems": alignment.problems if alignment else [],
        "blocks": alignment.blocks if alignment else [],
        "untaught": facts.missing.get("alignment", ""),
    }


def _rows(facts: TaskFacts, why: str) -> list[tuple[str, str]]:
    rows = [("dropped", dropped(facts))]
    if facts.problem:
        return rows
    rows += [
        ("accuracy without", f"{share(facts.without)} on {facts.examples} training examples"),
        ("accuracy with", why or share(facts.with_it)),
    ]
    if not why:
        told = facts.missing.get("divergence") or nats(facts.divergence)
        rows += [("gap", gap_text(facts.gap)), ("teacher ‖ student", told)]
    if facts.demonstrations is not None:
        rows.append(("demonstrations pass", f"{facts.demonstrations:.2f} by the task's own scorer"))
    return rows


def _bars(facts: TaskFacts) -> list[dict[str, Any]]:
    """Accuracies as points on a line from 0 to 100, with their intervals."""
    pairs = {"without": facts.without, "with": facts.with_it}
    return [_bar(name, own) for name, own in pairs.items() if own is not None]


def _bar(name: str, own: Estimate) -> dict[str, Any]:
    low, high = (100 * end for end in own.ci95)
    return {"name": name, "at": 100 * own.score, "low": low, "width": max(high - low, 0.5)}
