"""Plots of a retention report: the matrix as a heat-map, and every column across the stages.

Figures are made with matplotlib's objects, never `pyplot`, whose global state would meddle with a
notebook's. Colours are told apart by colour-blind readers (cividis; Okabe & Ito).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from sdft.metrics import Cell

_CELL = (1.05, 0.62)  # inches
_TASK, _SUITE, _TRAINED, _MUTED = "#0072B2", "#D55E00", "#F0E442", "#666666"
_SUITE_GAP = 0.25  # the space between tasks and suites, in cells
_PANEL = (2.6, 2.1)  # inches, a small plot with its labels
_PER_LINE = 4  # small plots in a line


def plot_matrix(
    rows: Sequence[Sequence[Cell]], tasks: Sequence[str], suites: Sequence[str], caption: str
) -> Figure:
    """The matrix as a heat-map: the base and the stages down, tasks then suites across.

    The cell of the task that a stage trains is framed; an undefined cell is hatched.

    Args:
        rows: Cells `[rows][columns]`, the base row first.
        tasks: Names in their order of training.
        suites: Names of the prior suites.
        caption: Text under the title, one line per line.
    """
    names = [*tasks, *suites]
    labels = ["base", *(f"{i}. {_short(name, 24)}" for i, name in enumerate(tasks, 1))][: len(rows)]
    slanted = [len(_short(name, 28)) for name in names]
    left = max(0.5 + 0.085 * max(map(len, labels), default=0), 0.066 * slanted[0] - 0.4)
    bottom, top = 0.3 + 0.047 * max(slanted), 0.75
    top += 0.18 * (caption.count("\n") + 1)
    edges = [_edge(column, len(tasks)) for column in range(len(names))]
    width = _CELL[0] * (edges[-1] + 1)
    height = _CELL[1] * max(len(rows), 1)
    figure = _figure(max(left + width + 0.9, 6.2), height + bottom + top)
    axes = _place(figure, left, bottom, width, height)
    for i, row in enumerate(rows):
        for column, cell in enumerate(row):
            _draw_cell(axes, edges[column], i, cell)
    for stage in range(1, len(rows)):
        _frame(axes, edges[stage - 1], stage)
    axes.set_xlim(0, edges[-1] + 1)
    axes.set_ylim(max(len(rows), 1), 0)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], labels)
    axes.set_xticks([edge + 0.62 for edge in edges], [_short(name, 28) for name in names])
    axes.tick_params(length=0, labelsize=9)
    for column, label in enumerate(axes.get_xticklabels()):
        label.set(rotation=35, ha="right", rotation_mode="anchor")
        label.set_color(_TASK if column < len(tasks) else _SUITE)
    axes.spines[:].set_visible(False)
    _group_titles(axes, edges, len(tasks))
    _heading(figure, "Score after each stage (framed: the task it trained)", caption)
    _colour_bar(figure, left + width + 0.15, bottom, height)
    return figure


def plot_curves(
    rows: Sequence[Sequence[Cell]], tasks: Sequence[str], suites: Sequence[str], caption: str
) -> Figure:
    """One small plot per task and suite across the stage boundaries, with 95 % bands.

    The stage that trains the task is shaded. All share their axes, which span the whole sequence
    also while it is under way.

    Args:
        rows: Cells `[rows][columns]`, the base row first.
        tasks: Names in their order of training.
        suites: Names of the prior suites.
        caption: Text under the title, one line per line.
    """
    across = min(max(len(tasks), len(suites)), _PER_LINE)
    task_lines, suite_lines = (math.ceil(len(group) / across) for group in (tasks, suites))
    down = task_lines + suite_lines
    top = 0.75 + 0.18 * (caption.count("\n") + 1)
    figure = _figure(max(0.7 + _PANEL[0] * across, 6.2), 0.15 + _PANEL[1] * down + top)
    for column, name in enumerate([*tasks, *suites]):
        trained = column + 1 if column < len(tasks) else None
        # The suites begin a new line.
        line, place = divmod(column if trained else column - len(tasks), across)
        line += 0 if trained else task_lines
        from_bottom = 0.55 + _PANEL[1] * (down - 1 - line)
        size = _PANEL[0] - 0.3, _PANEL[1] - 0.7
        axes = _place(figure, 0.6 + _PANEL[0] * place, from_bottom, *size)
        _draw_curve(axes, [row[column] for row in rows], trained, len(tasks))
        _label_panel(axes, name, trained, place == 0)
    _heading(figure, "Score across stage boundaries", caption)
    _legend(figure, 0.4 + 0.18 * (caption.count("\n") + 1), bool(suites))
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whatever the file's suffix."""
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=150)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), facecolor="white")


def _place(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches, so that labels have their room whatever the number of columns."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / down, width / across, height / down))


def _short(name: str, length: int) -> str:
    """Cut in the middle: long names often differ at their ends."""
    head, tail = length // 2, length - length // 2 - 1
    return name if len(name) <= length else f"{name[:head]}…{name[-tail:]}"


def _edge(column: int, tasks: int) -> float:
    return column + (_SUITE_GAP if column >= tasks > 0 else 0)


def _draw_cell(axes: Axes, left: float, top: float, cell: Cell) -> None:
    if cell.score is None:
        _box(axes, left, top, facecolor="#eeeeee", edgecolor="#aaaaaa", hatch="////", linewidth=0)
        _box(axes, left + 0.3, top + 0.3, 0.36, 0.34, facecolor="#eeeeee", linewidth=0)
        _write(axes, left, top + 0.5, "n/a", 10, _MUTED)
        return
    _box(axes, left, top, facecolor=colormaps["cividis"](cell.score), linewidth=0)
    ink = "white" if cell.score < 0.55 else "black"
    _write(axes, left, top + 0.42, f"{cell.score:.2f}", 11, ink)
    if cell.ci95 is not None:
        _write(axes, left, top + 0.76, "{:.2f}–{:.2f}".format(*cell.ci95), 7, ink)


def _frame(axes: Axes, left: float, top: float) -> None:
    _box(axes, left, top, fill=False, edgecolor="black", linewidth=2, clip_on=False)


def _box(
    axes: Axes, left: float, top: float, width: float = 0.96, height: float = 0.94, **style: Any
) -> None:
    axes.add_patch(Rectangle((left + 0.02, top + 0.03), width, height, **style))


def _write(axes: Axes, left: float, height: float, text: str, size: int, ink: str) -> None:
    axes.text(left + 0.5, height, text, ha="center", va="center", fontsize=size, color=ink)


def _group_titles(axes: Axes, edges: Sequence[float], tasks: int) -> None:
    groups = [("tasks", 0, _TASK), ("prior suites", tasks, _SUITE)]
    for title, first, colour in groups if 0 < tasks < len(edges) else []:
        axes.text(edges[first] + 0.02, -0.08, title, color=colour, fontsize=9, va="bottom")


def _colour_bar(figure: Figure, left: float, bottom: float, height: float) -> None:
    axes = _place(figure, left, bottom, 0.14, height)
    axes.imshow([[i / 99] for i in range(100)], cmap="cividis", origin="lower", aspect="auto")
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.set_yticks([0, 49.5, 99], ["0", "0.5", "1"], fontsize=8)
    axes.spines[:].set_visible(False)


def _heading(figure: Figure, title: str, caption: str) -> None:
    height = figure.get_figheight()
    left = 0.15 / figure.get_figwidth()
    figure.text(left, 1 - 0.12 / height, title, va="top", fontsize=12, fontweight="bold")
    figure.text(left, 1 - 0.38 / height, caption, va="top", fontsize=9, color=_MUTED)


def _draw_curve(axes: Axes, cells: Sequence[Cell], trained: int | None, stages: int) -> None:
    if trained is not None:
        axes.axvspan(trained - 1, trained, color=_TRAINED, alpha=0.35, linewidth=0)
    for boundary in range(stages + 1):
        axes.axvline(boundary, color="#cccccc", linewidth=0.7, linestyle=":")
    if cells and cells[0].score is not None:
        axes.axhline(cells[0].score, color=_MUTED, linewidth=0.9, linestyle="--")
    colour = _SUITE if trained is None else _TASK
    scores = [math.nan if cell.score is None else cell.score for cell in cells]
    low = [math.nan if cell.ci95 is None else cell.ci95[0] for cell in cells]
    high = [math.nan if cell.ci95 is None else cell.ci95[1] for cell in cells]
    stage = range(len(cells))
    axes.fill_between(stage, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.vlines(stage, low, high, color=colour, alpha=0.5, linewidth=1.2)
    axes.plot(stage, scores, color=colour, marker="o", markersize=4, linewidth=1.6)
    missing = [i for i, cell in enumerate(cells) if cell.score is None]
    axes.plot(missing, [0.5] * len(missing), "x", color=_MUTED, markersize=6)
    axes.set_xlim(-0.15, stages + 0.15)
    axes.set_ylim(-0.03, 1.03)


def _label_panel(axes: Axes, name: str, trained: int | None, first: bool) -> None:
    title = name if trained is None else f"{trained}. {name}"
    axes.set_title(_short(title, 30), fontsize=9, loc="left", pad=4)
    stages = round(axes.get_xlim()[1])
    every = max(1, math.ceil(stages / 8))
    shown = range(0, stages + 1, every)
    axes.set_xticks(shown, ["base", *map(str, shown[1:])])
    axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"] if first else ["", "", ""])
    axes.tick_params(labelsize=8, color="#cccccc")
    axes.spines[["top", "right"]].set_visible(False)
    if first:
        axes.set_ylabel("score", fontsize=8)
    axes.set_xlabel("after stage", fontsize=8, labelpad=1)


def _legend(figure: Figure, from_top: float, with_suites: bool) -> None:
    handles: list[Line2D | Patch] = [Line2D([], [], color=_TASK, marker="o", label="task, 95 %")]
    if with_suites:
        handles.append(Line2D([], [], color=_SUITE, marker="o", label="prior suite, 95 %"))
    handles += [
        Patch(color=_TRAINED, alpha=0.35, label="stage that trains it"),
        Line2D([], [], color=_MUTED, linestyle="--", label="base"),
        Line2D([], [], color=_MUTED, marker="x", linestyle="", label="undefined"),
    ]
    anchor = (0.1 / figure.get_figwidth(), 1 - from_top / figure.get_figheight())
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=anchor,
        ncols=len(handles),
        fontsize=8,
        frameon=False,
        handlelength=1.5,
        columnspacing=1.2,
    )
