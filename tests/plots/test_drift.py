"""The chart of attention drift: a file of its own, in the report's style."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from quantlens.plots.drift import drift_svg, write_drift
from quantlens.plots.style import chart_style, file_style


def summary(amount: float) -> dict[str, float]:
    names = ("rollout_spearman", "row_kl", "outliers", "rollout_overlap", "prediction_changed", "output_kl")
    return dict.fromkeys(names, amount)


def test_text_is_escaped_and_every_metric_has_a_panel():
    drawing = drift_svg("a <b>", {"W8A8": {"<ID>": summary(0.1)}, "W4A4": {"<ID>": summary(0.5)}})
    assert "<b>" not in drawing
    assert "&lt;ID&gt;" in drawing
    assert drawing.count('class="chart lines"') == 6
    root = ElementTree.fromstring(drawing)
    assert len(root.findall(".//{*}circle[@class='m']")) == 6 * 2 + 1, "a mark per precision, and the legend's"


def test_a_set_without_a_value_leaves_a_gap(tmp_path):
    drifts = {"W8A8": {"ID": summary(0.1), "far": {}}, "W4A4": {"ID": summary(0.5)}}
    text = write_drift("t", drifts, tmp_path / "drift.svg").read_text()
    assert text == drift_svg("t", drifts)
    ElementTree.fromstring(text)


def test_files_have_the_style_of_the_report_without_variables():
    assert "var(" not in file_style()
    assert ":root" not in file_style()
    assert ".c0 { color: #0b62a4; }" in file_style()
    assert file_style().count("{") == pytest.approx(chart_style().count("{"), abs=1)
