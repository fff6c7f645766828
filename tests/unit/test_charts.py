"""Scales and charts: where a value lands, and that no value breaks a page."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

from lamina.protos.pages import charts, rows
from lamina.protos.pages.charts import Axis, Series


def test_linear_scale_and_ticks_are_round() -> None:
    scale = charts.fit([0.0, 10.0], Axis("", bounds=(0.0, 10.0)), 100.0, 0.0)
    assert [scale.at(value) for value in (0.0, 5.0, 10.0)] == [100.0, 50.0, 0.0]
    assert scale.ticks() == [(0.0, "0"), (2.0, "2"), (4.0, "4"), (6.0, "6"), (8.0, "8"), (10.0, "10")]
    assert [text for _, text in charts.fit([1, 2], Axis("", whole=True), 0, 1).ticks(6)] == ["1", "2"]


def test_log_scale_puts_zero_on_a_labelled_floor() -> None:
    scale = charts.fit([0.0, 1e-8, 1e-2], Axis("", log=True), 0.0, 70.0)  # floor 1e-9, then one step of 10 a decade
    assert [round(scale.at(value), 9) for value in (0.0, 1e-8, 1e-2)] == [0.0, 10.0, 70.0]
    assert scale.ticks(7)[:2] == [(1e-9, "0"), (1e-8, "10⁻⁸")]


def test_line_breaks_at_nan_and_labels_do_not_overlap() -> None:
    near = [Series(f"run {n}", [0, 1, 2, 3], [1.0, math.nan if n == 0 else 1.0, 1.0, 1.0], f"c{n}") for n in range(6)]
    chart = ET.fromstring(charts.line_chart(near, Axis("x"), Axis("y"), "six"))
    broken = next(g for g in chart if g.attrib.get("class", "").startswith("c0"))
    assert broken[0].attrib["d"].count("M") == 2
    places = sorted(
        float(text.attrib["y"]) for text in chart.iter("text") if text.attrib.get("class", "").startswith("end")
    )
    assert len(places) == 6
    assert min(b - a for a, b in pairwise(places)) >= 16.9


def test_charts_of_extreme_values_stay_finite() -> None:
    odd = [None, math.nan, math.inf, -math.inf, 1e308, 0.0]
    for log in (False, True):
        chart = charts.line_chart([Series("odd", range(6), odd, "c0")], Axis("x"), Axis("y", log=log), "odd")
        for path in ET.fromstring(chart).iter("path"):
            assert not re.search("nan|inf", path.attrib["d"])


def test_a_span_row_places_interval_dot_and_levels() -> None:
    scale = charts.fit([], Axis("", bounds=(0.0, 8.0)), 0.0, 100.0)
    row = ET.fromstring(rows.span_row((2.0, 6.0), [(4.0, "fill c0")], [1.0, None], scale, "four"))
    span = next(line for line in row if line.attrib.get("class") == "join fill c0")
    assert (span.attrib["x1"], span.attrib["x2"]) == ("25.00%", "75.00%")
    assert [dot.attrib["cx"] for dot in row.iter("circle")] == ["50.00%"]
    assert [line.attrib["x1"] for line in row if "mark" in line.attrib.get("class", "")] == ["12.50%"]
    empty = ET.fromstring(rows.span_row((None, 6.0), [(math.nan, "fill c0")], [], scale, "nothing"))
    assert {one.attrib.get("class", one.tag) for one in empty} == {"grid", "title"}
