"""Charts as SVG: valid XML, escaped text, marks where the figures put them."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from quantlens.plots import svg
from quantlens.plots.histograms import Outline, Reliability, histogram, reliability_diagram
from quantlens.plots.svg import Bar, Point, Series, Style

NS = "{http://www.w3.org/2000/svg}"


def parsed(text: str) -> ET.Element:
    return ET.fromstring(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (38.8, 82.7), (-3, 2), (0.001, 0.0042), (5, 5), (0, 0), (12345, 99999)]
)
def test_ticks_enclose_the_range_evenly(low, high):
    ticks = svg.nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    steps = {round(b - a, 9) for a, b in pairwise(ticks)}
    assert len(steps) == 1
    assert 3 <= len(ticks) <= 9


def test_tick_text():
    assert svg.tick_text(-0.25, 0.25) == "−0.25"
    assert svg.tick_text(40.0, 20) == "40"
    assert svg.tick_text(-2000, 500) == "−2.0k"
    assert svg.tick_text(30000, 10000) == "30k"
    assert svg.tick_text(0.0, 0.2) == "0.0"


def test_line_chart_places_points_in_proportion():
    style = Style(1)
    points = [Point(0, 20, 2, "first"), Point(1, 60, None, "second"), None, Point(3, 40, 1)]
    places = [(0.0, "FP32"), (1.0, "W8A8"), (2.0, "W6A6"), (3.0, "W4A4")]
    text = svg.line_chart(
        [Series("a", style, 0, points)], places, title="t", description="d", y_label="AUPR-out %", chance=30
    )
    root = parsed(text)
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{NS}circle")]
    assert len(circles) == 3
    (x0, y0), (x1, y1), (x3, y3) = circles
    assert y1 < y3 < y0
    assert (y0 - y3) == pytest.approx(y3 - y1, abs=0.2)
    assert (x3 - x0) == pytest.approx(3 * (x1 - x0), abs=0.3)
    line = next(p.get("d") for p in root.iter(f"{NS}path") if p.get("class") == "l")
    assert line.count("M") == 2, "a missing figure leaves a gap"
    bars = next(p.get("d") for p in root.iter(f"{NS}path") if p.get("class") == "e")
    assert bars.count("V") == 2, "no error bar where there is one seed"
    assert "chance 30.0" in text
    assert [t.text for t in root.iter(f"{NS}title")] == ["t", "first", "second"]


def test_crowded_precisions_are_set_on_two_lines():
    places = [(float(i), f"W{i}A{i}") for i in range(12)]
    series = [Series("a", Style(0), 0, [Point(x, x) for x, _ in places])]
    root = parsed(svg.line_chart(series, places, title="t", description="d", y_label="y"))
    assert [t.text for t in root.iter(f"{NS}tspan")][:2] == ["W0", "A0"]


def test_text_is_escaped():
    evil = '<script>alert("1")</script>&'
    bar = Bar(evil, 1.0, None, evil, Style(0), evil)
    chart = svg.bar_chart([bar], title=evil, description=evil)
    assert "<script" not in chart
    assert parsed(chart).find(f"{NS}title").text == evil


def test_bars_grow_with_the_value_and_turn_at_zero():
    bars = [Bar(str(v), v, 0.5, str(v), Style(0)) for v in (10.0, 5.0, -5.0)]
    root = parsed(svg.bar_chart(bars, title="t", description="d"))
    rects = [(float(r.get("x")), float(r.get("width"))) for r in root.iter(f"{NS}rect")]
    assert rects[0][1] == pytest.approx(2 * rects[1][1], abs=0.2)
    assert rects[0][0] == rects[1][0]
    assert rects[2][0] + rects[2][1] == pytest.approx(rects[0][0], abs=0.2)


def test_bars_of_nothing_lost():
    parsed(svg.bar_chart([Bar("a", 0.0, None, "0", Style(0))], title="t", description="d"))


def test_histogram_outline_follows_the_heights():
    outline = Outline([0.0, 1.0, 2.0, 3.0], [10.0, 10.0, 0.0], "id qu", "ID")
    root = parsed(histogram([outline], title="t", description="d", x_label="x", y_label="%"))
    path = next(p.get("d") for p in root.iter(f"{NS}path") if p.get("class") == "h id qu")
    assert path.count("H") == 2, "equal neighbours are one step"
    up, down = (float(path.split("v")[i].split("H")[0]) for i in (1, 2))
    assert up < 0
    assert down == -up


def test_constant_scores_have_a_histogram():
    parsed(histogram([Outline([1.0, 1.0], [0.0], "id", "ID")], title="t", description="d", x_label="x", y_label="y"))


def test_reliability_marks_lie_at_confidence_and_accuracy():
    curve = Reliability([(0.5, 0.5, 0.25), (1.0, 0.0, 0.75)], "c0", "W4A4")
    root = parsed(reliability_diagram([curve], title="t", description="d"))
    first, second = [(float(c.get("cx")), float(c.get("cy")), float(c.get("r"))) for c in root.iter(f"{NS}circle")]
    assert second[0] > first[0]
    assert second[1] > first[1]
    assert second[2] > first[2], "more images, larger mark"


def test_many_series_look_different():
    looks = {Style.numbered(i) for i in range(20)}
    assert len(looks) == 20
