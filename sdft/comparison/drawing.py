"""How a comparison is drawn: each method's colour and marker, panels of lines, labels apart.

Figures are made with matplotlib's objects, never `pyplot`; the colours are Okabe & Ito's, which
colour-blind readers tell apart, and every method has a marker of its own beside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sdft.comparison.curves import Lines, plotted
from sdft.comparison.summary import Summary

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
OTHER, MUTED, TRAINED = "#b5b5b5", "#666666", "#F0E442"


@dataclass(frozen=True)
class Picture:
    """A figure with what is said below it.

    Attributes:
        name: The file's, without `.png`.
        title: In the report.
        caption: What it shows, in a sentence or two.
        figure: The drawing.
    """

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Style:
    """How a method is drawn.

    Attributes:
        label: Its name in legends.
        colour: Its own, or grey when there are more methods than colours.
        marker: Likewise.
        named: Whether the colour is its own.
    """

    label: str
    colour: str = OTHER
    marker: str = "."
    named: bool = False


def styles(summary: Summary) -> dict[str, Style]:
    """Method → style. With more methods than colours: the best of them, and the baseline."""
    methods = [standing.method for standing in summary.standings if standing.results]
    names = [method.name for method in methods]
    if len(names) > len(COLOURS):
        best = [standing.method.name for standing in summary.ranked]
        baseline = summary.plan.values.baseline
        kept = [name for name in best if name != baseline][: len(COLOURS) - 1]
        names = [name for name in names if name in {*kept, baseline}]
    looks = dict(zip(names, zip(COLOURS, MARKERS, strict=True), strict=False))
    return {
        method.name: Style(method.label, *looks[method.name], named=True)
        if method.name in looks
        else Style(method.label)
        for method in methods
    }


def draw_lines(axes: Axes, lines: Lines, looks: Mapping[str, Style], stages: int) -> None:
    """The methods' means over seeds, each seed thin behind; the stage that trains it shaded."""
    if lines.stage is not None:
        axes.axvspan(lines.stage - 1, lines.stage, color=TRAINED, alpha=0.3, linewidth=0)
    level = 0.0 if lines.scaled else lines.base
    if level is not None:
        axes.axhline(level, color=MUTED, linewidth=0.9, linestyle="--", zorder=1)
    if lines.scaled:
        axes.axhline(1.0, color=MUTED, linewidth=0.6, linestyle=":", zorder=1)
    # Those without a colour of their own first: they stay behind.
    for name in sorted(lines.means, key=lambda name: looks[name].named):
        look, rows = looks[name], range(len(lines.means[name]))
        for series in lines.seeds[name] if look.named else ():
            axes.plot(rows, plotted(series), color=look.colour, alpha=0.35, linewidth=0.7)
        style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "markersize": 4.5}
        axes.plot(rows, plotted(lines.means[name]), linewidth=1.7 if look.named else 0.8, **style)
    axes.set_xlim(-0.15, stages + 0.15)
    every = max(1, -(-stages // 8))
    shown = range(0, stages + 1, every)
    axes.set_xticks(shown, ["base", *map(str, shown[1:])])


def _handles(looks: Mapping[str, Style]) -> list[Line2D]:
    """One per method with a colour, and one for all others."""
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, markersize=5, label=look.label)
        for look in looks.values()
        if look.named
    ]
    others = sum(not look.named for look in looks.values())
    if others:
        handles.append(Line2D([], [], color=OTHER, marker=".", label=f"{others} others"))
    return handles


def plain(axes: Axes, title: str) -> None:
    """The look that all panels share."""
    axes.set_title(title, fontsize=9.5, loc="left", pad=5)
    axes.tick_params(labelsize=8.5, color="#cccccc")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")


def place(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / down, width / across, height / down))


def heading(figure: Figure, title: str, caption: str) -> None:
    """A bold title, and a line below it."""
    across, down = figure.get_size_inches()
    figure.text(0.15 / across, 1 - 0.12 / down, title, va="top", fontsize=12, fontweight="bold")
    figure.text(0.15 / across, 1 - 0.40 / down, caption, va="top", fontsize=9, color=MUTED)


def short(name: str, length: int) -> str:
    """Cut in the middle, visibly: long names often differ at their ends."""
    head, tail = length // 2, length - length // 2 - 1
    return name if len(name) <= length else f"{name[:head]}…{name[-tail:]}"


def legend_rows(looks: Mapping[str, Style], width: float) -> int:
    """Lines that the legend takes in a figure of this width in inches."""
    return math.ceil(len(_handles(looks)) / _legend_columns(looks, width))


def _legend_columns(looks: Mapping[str, Style], width: float) -> int:
    longest = max((len(look.label) for look in looks.values()), default=1)
    return max(1, min(len(looks), int((width - 0.2) / (0.55 + 0.075 * longest))))


def draw_legend(figure: Figure, looks: Mapping[str, Style], from_top: float) -> None:
    """The legend, its top at this distance from the figure's, in inches."""
    across, down = figure.get_size_inches()
    figure.legend(
        handles=_handles(looks),
        loc="upper left",
        bbox_to_anchor=(0.1 / across, 1 - from_top / down),
        ncols=_legend_columns(looks, across),
        fontsize=9,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.3,
        borderaxespad=0.0,
    )
