"""Where the lines of a chart go: positions as plain data, for a template to draw as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640.0, 300.0
"""Size of a chart in its own units; it is scaled to the page."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 12.0, 12.0, 42.0
_DECADES = 6
"""Figures this many powers of ten below the largest are drawn at the bottom: zero has no logarithm."""


@dataclass(frozen=True)
class Series:
    """Values to draw as one line, at 1, 2, 3...; a value that is not finite is left out."""

    name: str
    values: Sequence[float]


@dataclass(frozen=True)
class Line:
    """A drawn series: ``points`` for ``<polyline>`` and a (x, y, label) for every point."""

    name: str
    points: str
    dots: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class LineChart:
    """A chart ready to draw, in units of ``width`` by ``height``.

    Attributes:
        lines: the series, in order.
        x_ticks: (x, label).
        y_ticks: (y, label).
        left, right, top, bottom: the edges of the plotting area.
        logarithmic: whether the vertical axis is.
    """

    lines: Sequence[Line]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    logarithmic: bool
    width: float = WIDTH
    height: float = HEIGHT
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM


def line_chart(series: Sequence[Series], labels: Sequence[str]) -> LineChart:
    """Lay out series of non-negative figures that share their horizontal places.

    The vertical axis is logarithmic as soon as there is a positive figure: errors span decades.

    Args:
        series: at least one.
        labels: of the horizontal places.
    """
    finite = [value for line in series for value in line.values if math.isfinite(value)]
    positive = [value for value in finite if value > 0]
    count = max(len(labels), 1)

    def across(index: int) -> float:
        room = WIDTH - _LEFT - _RIGHT
        return round(_LEFT + room * ((index + 0.5) / count), 2)

    if positive:
        highest = math.ceil(math.log10(max(positive)))
        lowest = max(math.floor(math.log10(min(positive))), highest - _DECADES)
        lowest = min(lowest, highest - 1)
        ticks = [(_place(decade, lowest, highest), f"{10.0**decade:g}") for decade in range(lowest, highest + 1)]
    else:
        lowest, highest, ticks = 0, 1, [(_place(0, 0, 1), "0")]

    def up(value: float) -> float:
        return _place(max(math.log10(value), lowest) if value > 0 else lowest, lowest, highest)

    return LineChart(
        lines=[_line(line, across, up, labels) for line in series],
        x_ticks=[(across(index), labels[index]) for index in _spread(len(labels))],
        y_ticks=ticks,
        logarithmic=bool(positive),
    )


def _place(value: float, lowest: float, highest: float) -> float:
    room = HEIGHT - _TOP - _BOTTOM
    return round(_TOP + room * (highest - value) / (highest - lowest), 2)


def _spread(count: int, at_most: int = 12) -> list[int]:
    """Return up to ``at_most`` evenly spaced indices below ``count``."""
    every = max(1, math.ceil(count / at_most))
    return list(range(0, count, every))


def _line(series: Series, across: Callable[[int], float], up: Callable[[float], float], labels: Sequence[str]) -> Line:
    dots = [
        (across(index), up(value), f"{series.name}, {labels[index]}: {value:.4g}")
        for index, value in enumerate(series.values)
        if math.isfinite(value)
    ]
    return Line(series.name, " ".join(f"{x},{y}" for x, y, _ in dots), dots)
