"""The content of `compare.json`."""

from __future__ import annotations

import platform
from typing import Any

import torch

from sdft import __version__
from sdft.comparison.curves import column_lines, length_lines
from sdft.comparison.estimate import Estimate
from sdft.comparison.notes import notes
from sdft.comparison.results import Result
from sdft.comparison.selection import Rate
from sdft.comparison.summary import QUALITIES, Standing, Summary, estimate_of
from sdft.comparison.verdict import headline


def content(summary: Summary, command: str) -> dict[str, Any]:
    """Everything, as plain values without NaN.

    Args:
        summary: The comparison.
        command: What repeats it.
    """
    winner = summary.winner
    return {
        "command": command,
        "comparison": summary.plan.to_dict(),
        "environment": {
            "sdft": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "tasks": summary.tasks,
        "suites": summary.suites,
        "base": summary.base_row,
        "selection": {
            "rule": summary.selection.rule,
            "split": summary.selection.split,
            "columns": list(summary.selection.columns),
        },
        "winner": None if winner is None else winner.method.name,
        "verdict": headline(summary),
        "summary": {s.method.name: _standing(summary, s) for s in summary.standings},
        "pairs": [pair.to_dict() for pair in summary.pairs],
        "rates": {s.method.name: [_rate(r) for r in s.rates] for s in summary.standings},
        "notes": notes(summary),
        "curves": [lines.to_dict() for lines in column_lines(summary)],
        "response_length": length_lines(summary).to_dict(),
        "runs": runs(summary),
        "failed": [
            {**_run(own.run), "reason": own.reason, "log": own.log}
            for own in summary.results.failed
        ],
    }


def runs(summary: Summary) -> list[dict[str, Any]]:
    """One entry per method × learning rate × seed, in the plan's order."""
    finished = {result.run: result for result in summary.results.finished}
    status = dict.fromkeys(finished, "finished")
    status |= {failure.run: "failed" for failure in summary.results.failed}
    status |= dict.fromkeys(summary.results.changed, "changed")
    chosen = {result.run for standing in summary.standings for result in standing.results}
    return [
        {
            **_run(run),
            "folder": str(summary.plan.folder(run)),
            "status": status.get(run, "missing"),
            "chosen": run in chosen,
            **_measured(finished.get(run)),
        }
        for run in summary.plan.runs
    ]


def _run(run: Any) -> dict[str, Any]:
    return {"method": run.method.name, "learning_rate": run.rate, "seed": run.seed}


def _measured(result: Result | None) -> dict[str, Any]:
    if result is None:
        return {"retention": None, "cost": None, "wall_seconds": None}
    return {
        "retention": result.retention,
        "cost": result.cost,
        "wall_seconds": result.seconds,
    }


def _standing(summary: Summary, standing: Standing) -> dict[str, Any]:
    found = {quality: own.to_dict() for quality, own in standing.estimates.items()}
    cost = {unit: standing.cost(unit) for unit in ("seconds", "flops")}
    cost |= {f"{unit}_x": summary.cost_factor(standing, unit) for unit in ("seconds", "flops")}
    return {
        "label": standing.method.label,
        "upper_bound": standing.method.upper_bound,
        "learning_rate": standing.rate.value if standing.rate else None,
        "seeds": standing.seeds,
        "n": len(standing.seeds),
        **found,
        "retention_by_suite": _dicts(standing.retention_by_suite),
        "final_by_column": _dicts(standing.final_by_column),
        "cost": cost,
        "undefined": _undefined(summary, standing, cost),
    }


def _dicts(estimates: dict[str, Estimate]) -> dict[str, Any]:
    return {name: own.to_dict() for name, own in estimates.items()}


def _undefined(
    summary: Summary, standing: Standing, cost: dict[str, float | None]
) -> dict[str, str]:
    """Why something is None: metric → reason."""
    found = {}
    for quality, own in standing.estimates.items():
        if own.mean is None:
            found[quality] = _reason(standing, quality) or own.note or "undefined"
        elif own.ci95 is None:
            found[f"{quality}.ci95"] = own.note or "undefined"
    for key in (key for key, value in cost.items() if value is None):
        whose = "a run of it" if cost[key.removesuffix("_x")] is None else "the baseline"
        found[f"cost.{key}"] = f"{whose} has no measured cost"
    if standing.rate is None:
        found["learning_rate"] = "no finished run"
    elif standing.rate.value is None:
        found["learning_rate"] = "not swept: the base's rate"
    return found


def _reason(standing: Standing, quality: str) -> str | None:
    """What the runs themselves say about it."""
    if not standing.results:
        return None
    if quality in ("prior", "retention") and not standing.results[0].suites:
        return "there are no prior suites"
    if quality == "kl_base":
        return "the runs did not measure it"
    reasons = (result.metrics["undefined"].get(quality) for result in standing.results)
    return next((reason for reason in reasons if reason), None)


def _rate(rate: Rate) -> dict[str, Any]:
    return {
        "learning_rate": rate.value,
        "seeds": [result.run.seed for result in rate.results],
        "n": len(rate.results),
        "selection_score": rate.score,
        **{quality: estimate_of(rate.results, quality).to_dict() for quality in QUALITIES},
    }
