"""The pictures of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sdft.comparison.curves import Lines, column_lines, length_lines, prior_lines
from sdft.comparison.drawing import (
    MUTED,
    Picture,
    Style,
    draw_legend,
    draw_lines,
    heading,
    legend_rows,
    place,
    plain,
    short,
    styles,
)
from sdft.comparison.pareto import draw_pareto, pareto
from sdft.comparison.summary import Summary, quality_of

_PANELS = 5  # tasks that the composite shows
_ACROSS = 4  # panels in a line of the curves


def pictures(summary: Summary) -> list[Picture]:
    """All that there are data for; none when no run is finished."""
    if not summary.results.finished:
        return []
    made = [_composite(summary), _curves(summary), pareto(summary), _drift(summary)]
    return [picture for picture in [*made, _lengths(summary)] if picture is not None]


# ---------------------------------------------------------------- across the stages


def _curves(summary: Summary) -> Picture:
    looks, stages = styles(summary), len(summary.tasks)
    tasks = [lines for lines in column_lines(summary) if lines.kind == "task"]
    suites = [lines for lines in column_lines(summary) if lines.kind == "suite"]
    across = min(max(len(tasks), len(suites)), _ACROSS)
    down = math.ceil(len(tasks) / across) + math.ceil(len(suites) / across)
    rows = legend_rows(looks, max(2.6 * across + 0.7, 6.6))
    figure = Figure(
        figsize=(max(2.6 * across + 0.7, 6.6), 0.65 + 0.25 * rows + 2.15 * down), facecolor="white"
    )
    for group, first in ((tasks, 0), (suites, math.ceil(len(tasks) / across))):
        for number, lines in enumerate(group):
            line, spot = divmod(number, across)
            bottom = 0.5 + 2.15 * (down - 1 - first - line)
            axes = place(figure, 0.6 + 2.6 * spot, bottom, 2.25, 1.4)
            _panel(axes, lines, looks, stages, first=spot == 0)
    heading(figure, "Across the stages", "mean over seeds, thin: each seed; dashed: the base")
    draw_legend(figure, looks, 0.65)
    text = (
        "New tasks are scaled: 0 is the base, 1 the best that any method reached after any stage "
        "(the stage that trains the task is shaded). Prior suites are as measured."
    )
    return Picture("curves", "Scores across the stages", text, figure)


def _panel(axes: Axes, lines: Lines, looks: Mapping[str, Style], stages: int, first: bool) -> None:
    draw_lines(axes, lines, looks, stages)
    number = "" if lines.stage is None else f"{lines.stage}. "
    raw = " (as measured)" if lines.kind == "task" and not lines.scaled else ""
    plain(axes, short(f"{number}{lines.name}{raw}", 34))
    _score_limits(axes, lines)
    if first:
        axes.set_ylabel("0 base, 1 best" if lines.scaled else "score", fontsize=8.5)
    axes.set_xlabel("after stage", fontsize=8.5, labelpad=1)


def _score_limits(axes: Axes, lines: Lines) -> None:
    known = [v for series in lines.means.values() for v in series if v is not None]
    low = min([0.0, *known]) if lines.scaled else 0.0
    axes.set_ylim(low - 0.05, 1.08)
    axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])


# ---------------------------------------------------------------- drift and length


def _drift(summary: Summary) -> Picture | None:
    """KL(base ‖ student) against forgetting, one point per run of the whole sweep."""
    looks = styles(summary)
    lost = "retention" if summary.suites else "forgetting"
    spots = []
    for standing in summary.standings:
        for rate in standing.rates:
            for result in rate.results:
                kl, change = quality_of(result, "kl_base"), quality_of(result, lost)
                if kl is not None and change is not None:
                    loss = -change if lost == "retention" else change
                    spots.append((kl, loss, looks[standing.method.name], rate is standing.rate))
    if not spots:
        return None
    figure = Figure(figsize=(6.6, 4.3 + 0.25 * legend_rows(looks, 6.6)), facecolor="white")
    axes = place(figure, 0.75, 0.6, 5.6, 2.9)
    for kl, loss, look, chosen in spots:
        face = look.colour if chosen else "white"
        style: dict[str, Any] = {
            "marker": look.marker,
            "color": look.colour,
            "markersize": 6,
            "linestyle": "",
        }
        axes.plot(kl, loss, **style, markerfacecolor=face)
    axes.axhline(0, color=MUTED, linewidth=0.9, linestyle="--", zorder=0)
    values = [kl for kl, *_ in spots]
    if min(values) > 0 and max(values) / min(values) > 30:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.set_xlabel("KL(base ‖ student) per token on the tasks' prompts, nats", fontsize=9)
    what = "lost on the prior suites" if summary.suites else "forgotten of earlier tasks"
    axes.set_ylabel(f"score {what}", fontsize=9)
    plain(axes, "")
    heading(figure, "Distance from the base, and what was lost", "every run; filled: chosen rates")
    draw_legend(figure, looks, 0.65)
    text = (
        "One point per run of the sweep: how far the student moved from the base, on the base's "
        f"own responses to the tasks' prompts, against what was {what}."
    )
    return Picture("kl_forgetting", "KL(base ‖ student) against forgetting", text, figure)


def _lengths(summary: Summary) -> Picture | None:
    lines, looks = length_lines(summary), styles(summary)
    if all(value is None for series in lines.means.values() for value in series):
        return None
    rows = legend_rows(looks, 6.6)
    figure = Figure(figsize=(6.6, 3.65 + 0.25 * rows), facecolor="white")
    axes = place(figure, 0.75, 0.6, 5.6, 2.3)
    draw_lines(axes, lines, looks, len(summary.tasks))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    axes.set_xlabel("after stage", fontsize=9)
    axes.set_ylabel("tokens", fontsize=9)
    plain(axes, "")
    heading(figure, "Length of the responses", "mean over all tasks and suites; dashed: the base")
    draw_legend(figure, looks, 0.65)
    text = "Mean response length in tokens over all tasks and suites, after each stage."
    return Picture("length", "Response length", text, figure)


# ---------------------------------------------------------------- both in one


def _composite(summary: Summary) -> Picture:
    looks, stages = styles(summary), len(summary.tasks)
    panels = [lines for lines in column_lines(summary) if lines.kind == "task"][:_PANELS]
    prior = prior_lines(summary)
    panels += [prior] if prior is not None else []
    down = math.ceil(len(panels) / 2)
    left = 5.1 if summary.suites else 0.0
    height = max(1.95 * down, 3.9)
    rows = legend_rows(looks, left + 5.6)
    figure = Figure(figsize=(left + 5.6, height + 0.75 + 0.25 * rows), facecolor="white")
    if summary.suites:
        axes = place(figure, 0.75, 0.55, 4.15, height - 0.65)
        draw_pareto(axes, summary, looks, with_texts=False)
        axes.set_title("final scores; hollow: other learning rates", fontsize=9.5, loc="left")
    for number, lines in enumerate(panels):
        line, spot = divmod(number, 2)
        room = height / down
        bottom = 0.55 + room * (down - 1 - line)
        axes = place(figure, left + 0.65 + 2.55 * spot, bottom, 2.15, room - 0.65)
        _panel(axes, lines, looks, stages, first=spot == 0)
    caption = "mean over seeds at the chosen learning rates; bars: 95 % intervals; dashed: the base"
    heading(figure, _title(summary), caption)
    draw_legend(figure, looks, 0.63)
    text = (
        "Left: the mean final score over the new tasks against that over the prior suites, with "
        "95 % intervals over seeds. Right: each task across the stages (0 base, 1 best), and the "
        "prior suites as measured."
    )
    left_out = len(summary.tasks) - _PANELS
    text += f" {left_out} further tasks are in the curves below." if left_out > 0 else ""
    return Picture("compare", "The comparison at a glance", text, figure)


def _title(summary: Summary) -> str:
    seeds = len(summary.plan.values.seeds)
    columns = f"{len(summary.tasks)} new tasks"
    return (
        f"{columns} in sequence, {seeds} seed{'s' * (seeds != 1)}: what is learnt and what is kept"
    )
