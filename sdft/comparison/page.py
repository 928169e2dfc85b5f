"""The report to look at: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sdft import __version__
from sdft.comparison.drawing import Picture
from sdft.comparison.estimate import Estimate
from sdft.comparison.notes import budget_line, notes
from sdft.comparison.plan import rate_number
from sdft.comparison.selection import Rate
from sdft.comparison.summary import Standing, Summary, estimate_of
from sdft.comparison.verdict import (
    PAPER_COST,
    against_baseline,
    cost_sentences,
    headline,
    interval,
    number,
)

_HEADS = {
    "mean": "all columns",
    "acc": "ACC",
    "prior": "prior",
    "bwt": "BWT",
    "forgetting": "forgetting",
    "retention": "prior − base",
}
_SIGNED = ("bwt", "fwt", "retention")
_CONTEST = {"mean": "all columns", "acc": "ACC", "prior": "prior"}
_NAMED = 6  # methods that the title names
_INTERVALS = (
    "A number with an interval is the mean over seeds with Student's 95 % interval for it, cut "
    "where a score cannot go further. Differences are taken seed by seed, between runs with the "
    "same seed, and called noise when 0 lies within their interval. A seed sets the order of the "
    "data and the rollouts; base model, tasks and test examples stay the same, so the intervals "
    "do not cover other models, other tasks or other test examples (each run's retention.json has "
    "an interval over its test examples). Every difference has an interval of its own: among many "
    "methods one in twenty stands out by chance, and the winner, picked as the highest, is a "
    "little flattered."
)


@dataclass(frozen=True)
class TableCell:
    """A number, and what stands small below it."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class TableRow:
    """A method's line."""

    label: str
    cells: list[TableCell]
    winner: bool = False
    upper_bound: bool = False


def page(summary: Summary, pictures: Sequence[Picture], command: str) -> str:
    """The report as HTML; all text is escaped, pictures are part of it.

    Args:
        summary: The comparison.
        pictures: The first one stands at the top.
        command: What repeats it.
    """
    environment = Environment(
        loader=PackageLoader("sdft.comparison", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("page.html").render(
        **_verdict(summary),
        **_tables(summary),
        **_background(summary, command),
        pictures=[_embedded(picture) for picture in pictures],
    )


def png(picture: Picture) -> bytes:
    """A picture as a PNG file."""
    FigureCanvasAgg(picture.figure)
    file = io.BytesIO()
    picture.figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _embedded(picture: Picture) -> dict[str, str]:
    data = base64.b64encode(png(picture)).decode()
    return {"title": picture.title, "caption": picture.caption, "data": data}


def _verdict(summary: Summary) -> dict[str, Any]:
    winner = summary.winner
    labels = [standing.method.label for standing in summary.standings]
    names = ", ".join(labels) if len(labels) <= _NAMED else f"{len(labels)} methods"
    return {
        "title": f"Comparison: {names}",
        "stream": _stream(summary),
        "headline": headline(summary),
        "sentences": [*against_baseline(summary), *cost_sentences(summary)],
        "winner": winner.method.label if winner else "",
        "contest_heads": [_CONTEST[key] for key in _CONTEST if summary.suites or key != "prior"],
        "contests": _contests(summary),
        "failures": [
            {"title": own.run.title, "reason": f"it {own.reason}", "log": own.log}
            for own in summary.results.failed
        ],
        "missing": [r.title for r in (*summary.results.missing, *summary.results.changed)],
        "total": len(summary.plan.runs),
    }


def _contests(summary: Summary) -> list[TableRow]:
    rows = []
    for name in dict.fromkeys(pair.other for pair in summary.pairs):
        own = {pair.quality: pair.difference for pair in summary.pairs if pair.other == name}
        method = summary.standing[name].method
        cells = [
            TableCell(
                f"{number(found.estimate.mean, signed=True)}, {found.verdict or 'no verdict'}",
                interval(found.estimate.ci95, signed=True) or (found.estimate.note or ""),
            )
            for found in (own[key] for key in _CONTEST if key in own)
        ]
        cells.append(TableCell(str(len(own["mean"].seeds))))
        rows.append(TableRow(method.label, cells, upper_bound=method.upper_bound))
    return rows


def _stream(summary: Summary) -> str:
    if not summary.tasks:
        return ""
    tasks = f"{len(summary.tasks)} tasks in sequence ({', '.join(summary.tasks)})"
    suites = f", prior suites: {', '.join(summary.suites)}" if summary.suites else ""
    seeds = ", ".join(map(str, summary.plan.values.seeds))
    return f"{tasks}{suites}. Seeds {seeds}. {budget_line(summary) or ''}".strip()


def _tables(summary: Summary) -> dict[str, Any]:
    qualities = [key for key in _HEADS if summary.suites or key not in ("prior", "retention")]
    baseline = summary.standing[summary.plan.values.baseline].method.label
    there = [standing for standing in summary.standings if standing.results]
    heads = ["method", "rate", "seeds", *(_HEADS[key] for key in qualities)]
    columns = [*summary.tasks, *summary.suites]
    base = TableRow("base", [TableCell(number(summary.base_row[name])) for name in columns])
    return {
        "heads": [*heads, f"time × {baseline}", f"FLOPs × {baseline}"],
        "rows": [_row(summary, standing, qualities) for standing in there],
        "table_caption": _table_caption(summary, baseline),
        "columns": columns,
        "column_rows": [base, *(_column_row(summary, standing) for standing in there)],
        "rates": [_rate(s, rate) for s in summary.standings for rate in s.rates],
    }


def _table_caption(summary: Summary, baseline: str) -> str:
    prior = (
        " Prior: mean final score over the suites; prior − base: its change."
        if summary.suites
        else ""
    )
    return (
        "Mean over seeds, 95 % interval below. All columns: the mean of the final scores of all "
        f"tasks and suites; ACC: over the tasks; BWT and forgetting: over the earlier tasks.{prior}"
        f" Cost: training without evaluation, as a multiple of {baseline}'s. The paper "
        f"(arXiv 2601.19897) says that SDFT costs about {PAPER_COST['seconds']} × the time and "
        f"{PAPER_COST['flops']} × the FLOPs of SFT."
    )


def _row(summary: Summary, standing: Standing, qualities: Sequence[str]) -> TableRow:
    rate = standing.rate.value if standing.rate else None
    rate_cell = TableCell("base's" if rate is None else rate_number(rate))
    cells = [rate_cell, TableCell(str(len(standing.seeds)))]
    cells += [_cell(standing.estimates[key], key in _SIGNED) for key in qualities]
    for unit, form in (("seconds", "{:.0f} s"), ("flops", "{:.1e}")):
        factor, spent = summary.cost_factor(standing, unit), standing.cost(unit)
        small = "" if spent is None else form.format(spent).replace("e+", "e")
        cells.append(TableCell("n/a" if factor is None else f"{factor:.1f}", small))
    method = standing.method
    return TableRow(method.label, cells, standing is summary.winner, method.upper_bound)


def _column_row(summary: Summary, standing: Standing) -> TableRow:
    cells = [_cell(own, signed=False) for own in standing.final_by_column.values()]
    return TableRow(standing.method.label, cells, standing is summary.winner)


def _cell(own: Estimate, signed: bool) -> TableCell:
    return TableCell(number(own.mean, signed), interval(own.ci95, signed))


def _rate(standing: Standing, rate: Rate) -> dict[str, Any]:
    means = {key: number(estimate_of(rate.results, key).mean) for key in ("new", "prior", "mean")}
    return {
        "label": standing.method.label,
        "rate": "base's" if rate.value is None else rate_number(rate.value),
        "n": len(rate.results),
        "score": "n/a" if rate.score is None else f"{rate.score:.3f}",
        "chosen": rate is standing.rate,
        **means,
    }


def _background(summary: Summary, command: str) -> dict[str, Any]:
    example = summary.plan.folder(summary.plan.runs[0]) / "run.yaml"
    devices = {str((own.cost or {}).get("device", "")) for own in summary.results.finished}
    where = ", ".join(sorted(filter(None, devices)))
    return {
        "rule": summary.selection.rule,
        "split": summary.selection.split,
        "notes": notes(summary),
        "intervals": _INTERVALS,
        "command": command,
        "example": str(example),
        "environment": (
            f"sdft {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
            f"{platform.machine()}{f', {where}' if where else ''}"
        ),
    }
