"""The comparison as CSV and as a LaTeX table."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdft.comparison.estimate import Estimate
from sdft.comparison.plan import rate_number
from sdft.comparison.summary import QUALITIES, Standing, Summary

_CELL = ("n", "mean_length", "truncated", "artifact", "kl_base", "thought_length", "unfinished")
_RUN = ("method", "learning_rate", "seed", "chosen")
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "‖": r"$\Vert$",
    "–": "--",
    "−": "$-$",
}
_LOWER_IS_BETTER = ("forgetting",)
_HEADS = {"acc": "ACC", "bwt": "BWT", "forgetting": "forgetting", "prior": "prior", "mean": "mean"}


def write_cells(summary: Summary, path: Path) -> None:
    """Long format: one row per run × stage × column. An empty field is undefined."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*_RUN, "stage", "row", "column", "kind", "score", "low", "high", *_CELL))
        writer.writerows(_cells(summary))


def _cells(summary: Summary) -> Iterator[tuple[object, ...]]:
    chosen = {result.run for standing in summary.standings for result in standing.results}
    for result in summary.results.finished:
        run = result.run
        own = (run.method.name, run.rate, run.seed, run in chosen)
        labels = ["base", *result.tasks]
        kinds = ["task"] * len(result.tasks) + ["suite"] * len(result.suites)
        for stage, row in enumerate(result.retention["matrix"]):
            for name, kind, cell in zip(result.columns, kinds, row, strict=True):
                low, high = cell.get("ci95") or (None, None)
                rest = (cell.get(key) for key in _CELL)
                score = cell["score"]
                yield (*own, stage, labels[stage], name, kind, score, low, high, *rest)


def write_summary(summary: Summary, path: Path) -> None:
    """One row per method at its chosen rate: means, ends of the intervals, cost."""
    head = ["method", "label", "upper_bound", "learning_rate", "n"]
    for quality in QUALITIES:
        head += [quality, f"{quality}_low", f"{quality}_high"]
    units = ("seconds", "flops")
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*head, *units, *(f"{unit}_x" for unit in units)])
        for standing in summary.standings:
            method, rate = standing.method, standing.rate.value if standing.rate else None
            row = [method.name, method.label, method.upper_bound, rate, len(standing.seeds)]
            for quality in QUALITIES:
                own = standing.estimates[quality]
                row += [own.mean, *(own.ci95 or (None, None))]
            row += [standing.cost(unit) for unit in units]
            writer.writerow([*row, *(summary.cost_factor(standing, unit) for unit in units)])


# ---------------------------------------------------------------- LaTeX


def latex_table(summary: Summary) -> str:
    """A booktabs table of the methods at their chosen rates, the best of each column in bold.

    Upper bounds stand below a rule and are never bold. A mean has half the width of its 95 %
    interval beside it, or both ends where the interval was cut at 0 or 1.
    """
    qualities = [key for key in _HEADS if summary.suites or key != "prior"]
    baseline = latex(summary.standing[summary.plan.values.baseline].method.label)
    heads = [_HEADS[key] for key in qualities] + [rf"time / {baseline}", rf"FLOPs / {baseline}"]
    contestants = [s for s in summary.standings if not s.method.upper_bound]
    bounds = [s for s in summary.standings if s.method.upper_bound]
    lines = [_row(summary, s, qualities, contestants) for s in contestants]
    if bounds:
        lines += [r"\midrule", *(_row(summary, s, qualities, []) for s in bounds)]
    columns = "ll" + "r" * len(heads)
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(["method", "lr", *heads]) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _row(
    summary: Summary, standing: Standing, qualities: Sequence[str], contestants: Sequence[Standing]
) -> str:
    rate = standing.rate.value if standing.rate else None
    cells = [latex(standing.method.label), "--" if rate is None else rate_number(rate)]
    for quality in qualities:
        best = standing in contestants and _is_best(standing, quality, contestants)
        cells.append(_cell(standing.estimates[quality], quality == "bwt", best))
    for unit in ("seconds", "flops"):
        factor = summary.cost_factor(standing, unit)
        cells.append("--" if factor is None else f"{factor:.1f}")
    return " & ".join(cells) + r" \\"


def _cell(own: Estimate, signed: bool, best: bool) -> str:
    if own.mean is None:
        return "--"
    mean = _number(own.mean, signed)
    mean = rf"\textbf{{{mean}}}" if best else mean
    if own.ci95 is None:
        return mean
    low, high = own.ci95
    below, above = own.mean - low, high - own.mean
    if abs(below - above) < 5e-4:
        return rf"{mean} {{\scriptsize $\pm${max(below, above):.3f}}}"
    return rf"{mean} {{\scriptsize [{_number(low, signed)}, {_number(high, signed)}]}}"


def _number(value: float, signed: bool) -> str:
    rounded = round(value, 3) + 0.0
    text = f"{abs(rounded):.3f}"
    return f"${'-' if rounded < 0 else '+'}${text}" if signed or rounded < 0 else text


def _is_best(standing: Standing, quality: str, contestants: Sequence[Standing]) -> bool:
    sign = -1 if quality in _LOWER_IS_BETTER else 1
    means = [s.estimates[quality].mean for s in contestants]
    known = [round(sign * mean, 3) for mean in means if mean is not None]
    own = standing.estimates[quality].mean
    return own is not None and round(sign * own, 3) == max(known)


def latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in text)
