"""Writes labels beside points so that none covers another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in points of the figure."""
Pair = tuple[float, float]
"""Across and up, likewise."""
_NEAR = 0.8  # what a point of distance costs, in square points covered
_TEXT = 5.0  # how much worse it is to cover a text than a mark
_FAR = 12.0  # points from which a line leads to the text


@dataclass(frozen=True)
class Label:
    """A text beside a point.

    Attributes:
        x: Of the point, in data coordinates.
        y: Likewise.
        text: What is written.
        colour: Of the text.
        size: Of the font, in points.
    """

    x: float
    y: float
    text: str
    colour: str
    size: float = 9.0


def write_labels(
    axes: Axes,
    points: Iterable[tuple[float, float]],
    lines: Iterable[tuple[float, float]],
    labels: Sequence[Label],
) -> None:
    """Write each text where it covers least: no other text, no point, no edge.

    Args:
        axes: With their final limits.
        points: What must stay visible, in data coordinates.
        lines: Points of thin lines, likewise, but less so.
        labels: The first ones have the choice.
    """
    scale = 72.0 / axes.figure.get_dpi()  # pixels → points
    frame = axes.get_window_extent()
    edges = frame.x0 * scale, frame.y0 * scale, frame.x1 * scale, frame.y1 * scale
    marks = [_around(*_points(axes, point, scale), 4.0, 4.0) for point in points]
    marks += [_around(*_points(axes, point, scale), 1.0, 1.0) for point in lines]
    texts: list[Box] = []
    for label in labels:
        middle = _points(axes, (label.x, label.y), scale)
        half = 0.3 * label.size * len(label.text) + 1.5, 0.65 * label.size
        costs = {
            way: _cost(_moved(middle, way, half), marks, texts, edges) for way in _offsets(*half)
        }
        offset = min(costs, key=lambda way: costs[way] + _NEAR * _gap(way, half))
        texts.append(_moved(middle, offset, half))
        far = max(abs(offset[0]) - half[0], abs(offset[1]) - half[1]) > _FAR
        axes.annotate(
            label.text,
            (label.x, label.y),
            offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=label.size,
            color=label.colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.5}
            if far
            else None,
        )


def _points(axes: Axes, point: tuple[float, float], scale: float) -> tuple[float, float]:
    x, y = axes.transData.transform(point)
    return float(x) * scale, float(y) * scale


def _offsets(across: float, up: float) -> list[tuple[float, float]]:
    """Around the point, the near ones first."""
    ways = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    return [(x * (across + gap), y * (up + gap)) for gap in (6, 14, 24, 36) for x, y in ways]


def _moved(middle: Pair, offset: Pair, half: Pair) -> Box:
    return _around(middle[0] + offset[0], middle[1] + offset[1], *half)


def _gap(offset: Pair, half: Pair) -> float:
    """How far a text stands from its point."""
    return max(abs(offset[0]) - half[0] + abs(offset[1]) - half[1], 0.0)


def _cost(box: Box, marks: Sequence[Box], texts: Sequence[Box], edges: Box) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    outside = area - _overlap(box, edges)
    covered = sum(_overlap(box, mark) for mark in marks)
    return covered + _TEXT * sum(_overlap(box, text) for text in texts) + 2 * outside


def _around(x: float, y: float, across: float, up: float) -> Box:
    return x - across, y - up, x + across, y + up


def _overlap(one: Box, other: Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    up = min(one[3], other[3]) - max(one[1], other[1])
    return max(across, 0.0) * max(up, 0.0)
