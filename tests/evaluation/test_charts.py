"""Where lines go."""

from __future__ import annotations

import math

from lowbit.evaluation.charts import Series, line_chart


def test_a_decade_is_as_far_as_the_next() -> None:
    chart = line_chart([Series("error", [0.001, 0.01, 0.1])], ["1", "2", "3"])
    (line,) = chart.lines
    (x0, y0, label), (x1, y1, _), (x2, y2, _) = line.dots
    assert math.isclose(y0 - y1, y1 - y2)
    assert math.isclose(x1 - x0, x2 - x1)
    assert chart.left < x0 < x2 < chart.right
    assert (y0, y2) == (chart.bottom, chart.top)
    assert label == "error, 1: 0.001"
    assert [text for _, text in chart.y_ticks] == ["0.001", "0.01", "0.1"]
    assert chart.logarithmic


def test_zeros_lie_at_the_bottom() -> None:
    chart = line_chart([Series("error", [0.0, 0.5])], ["1", "2"])
    assert chart.lines[0].dots[0][1] == chart.bottom
    exact = line_chart([Series("error", [0.0, 0.0])], ["1", "2"])
    assert {y for _, y, _ in exact.lines[0].dots} == {exact.bottom}
    assert not exact.logarithmic


def test_what_is_not_finite_is_left_out_and_spans_are_limited() -> None:
    chart = line_chart([Series("a", [math.inf, 1.0, math.nan]), Series("b", [1e-300, 1e-12, 1.0])], ["1", "2", "3"])
    assert len(chart.lines[0].dots) == 1
    assert all(chart.top <= y <= chart.bottom for line in chart.lines for _, y, _ in line.dots)
    assert len(chart.y_ticks) == 7


def test_long_axes_have_few_labels() -> None:
    chart = line_chart([Series("a", [1.0] * 50)], [str(index) for index in range(50)])
    assert 5 <= len(chart.x_ticks) <= 12
