"""New skills against prior abilities: every learning rate of every method, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdft.comparison.drawing import MUTED, Picture, Style, heading, place, plain, styles
from sdft.comparison.labels import Label, write_labels
from sdft.comparison.plan import rate_number
from sdft.comparison.selection import Rate
from sdft.comparison.summary import Standing, Summary, estimate_of

_MARGIN = 0.06  # around the points, in score


def pareto(summary: Summary) -> Picture | None:
    """The picture; None without prior suites."""
    if not summary.suites:
        return None
    figure = Figure(figsize=(7.2, 5.4), facecolor="white")
    axes = place(figure, 0.8, 0.6, 6.2, 4.1)
    draw_pareto(axes, summary, styles(summary), with_texts=True)
    caption = "mean over seeds; filled: the chosen rate, with 95 % intervals; hollow: other rates"
    heading(figure, "New skills against prior abilities, over the sweep", caption)
    text = (
        "Every learning rate of every method: the mean final score over the new tasks against that "
        "over the prior suites. Up and to the right is better; the grey line joins the points that "
        "no other one surpasses in both."
    )
    return Picture("pareto", "New skills against prior abilities", text, figure)


def draw_pareto(axes: Axes, summary: Summary, looks: Mapping[str, Style], with_texts: bool) -> None:
    """Draw the points into axes that have their place.

    Args:
        axes: To draw into.
        summary: The comparison.
        looks: Of the methods.
        with_texts: Write the rates, and the names of methods without a colour of their own.
    """
    points: list[tuple[float, float]] = []
    names: list[Label] = []
    rates: list[Label] = []
    for standing in summary.standings:
        look = looks.get(standing.method.name)
        for rate in standing.rates:
            spot = _spot(rate)
            if spot is None or look is None:
                continue
            points.append(spot)
            chosen = rate is standing.rate
            _draw_spot(axes, spot, rate if chosen else None, look)
            if chosen and (look.named or with_texts):
                names.append(Label(*spot, look.label, look.colour if look.named else MUTED))
            elif with_texts and look.named and rate.value is not None:
                rates.append(Label(*spot, rate_number(rate.value), look.colour, size=7.0))
        _join(axes, standing, looks)
    if (base := _base_spot(summary)) is not None:
        points.append(base)
        axes.plot(*base, marker="x", color=MUTED, markersize=7, linestyle="")
        names.append(Label(*base, "base", MUTED))
    _draw_front(axes, points)
    _limits(axes, points)
    axes.set_xlabel("prior suites, final score", fontsize=9)
    axes.set_ylabel("new tasks, final score", fontsize=9)
    plain(axes, "")
    write_labels(axes, points, _along_bars(summary), [*names, *rates])


def _along_bars(summary: Summary) -> Iterator[tuple[float, float]]:
    """Points on the intervals' bars, for labels to keep off."""
    for standing in summary.standings:
        spot = _spot(standing.rate) if standing.rate else None
        if spot is None:
            continue
        for axis, quality in enumerate(("prior", "new")):
            low, high = standing.estimates[quality].ci95 or (spot[axis], spot[axis])
            for step in range(41):
                value = low + (high - low) * step / 40
                yield (value, spot[1]) if axis == 0 else (spot[0], value)


def _spot(rate: Rate) -> tuple[float, float] | None:
    prior, new = (estimate_of(rate.results, quality).mean for quality in ("prior", "new"))
    return None if prior is None or new is None else (prior, new)


def _base_spot(summary: Summary) -> tuple[float, float] | None:
    prior = [summary.base_row[name] for name in summary.suites]
    new = [summary.base_row[name] for name in summary.tasks]
    known = [value for value in [*prior, *new] if value is not None]
    if len(known) < len(prior) + len(new):
        return None
    return math.fsum(known[: len(prior)]) / len(prior), math.fsum(known[len(prior) :]) / len(new)


def _draw_spot(axes: Axes, spot: tuple[float, float], chosen: Rate | None, look: Style) -> None:
    size = 7 if look.named else 4
    style: dict[str, Any] = {
        "marker": look.marker,
        "color": look.colour,
        "markersize": size,
        "linestyle": "",
    }
    if chosen is None:
        axes.plot(*spot, **style, markerfacecolor="white", zorder=3)
        return
    axes.plot(*spot, **style, zorder=4)
    for quality, draw in (("prior", axes.hlines), ("new", axes.vlines)):
        found = estimate_of(chosen.results, quality).ci95
        if found is not None:
            level = spot[1] if quality == "prior" else spot[0]
            draw(level, *found, color=look.colour, alpha=0.45, linewidth=1.2, zorder=2)


def _join(axes: Axes, standing: Standing, looks: Mapping[str, Style]) -> None:
    """A thin line through a method's rates, in their order."""
    spots = [spot for rate in standing.rates if (spot := _spot(rate)) is not None]
    if len(spots) > 1:
        colour = looks[standing.method.name].colour
        axes.plot(*zip(*spots, strict=True), color=colour, alpha=0.35, linewidth=0.9, zorder=1)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one surpasses in one value without falling behind in the other."""
    kept: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept


def _draw_front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    kept = front(points)
    if len(kept) > 1:
        axes.plot(
            *zip(*kept, strict=True), color="#d0d0d0", linewidth=5, zorder=0, solid_capstyle="round"
        )


def _limits(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    for values, set_limits in (
        ([x for x, _ in points], axes.set_xlim),
        ([y for _, y in points], axes.set_ylim),
    ):
        low, high = min(values, default=0.0), max(values, default=1.0)
        room = max(0.0, 0.2 - (high - low)) / 2 + _MARGIN
        set_limits(max(low - room, -0.03), min(high + room, 1.05))
