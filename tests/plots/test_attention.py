"""The chart of attention drift of one model: a file of its own."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from quantlens.plots.precisions import drift_figure, write_drift


def summary(amount: float) -> dict[str, float]:
    names = ("rollout_spearman", "row_kl", "outliers", "rollout_overlap", "prediction_changed", "output_kl")
    return dict.fromkeys(names, amount)


def test_every_metric_has_a_panel_and_text_is_escaped(tmp_path):
    drifts = {"W8A8": {"<ID>": summary(0.1)}, "W4A4": {"<ID>": summary(0.5)}}
    figure = drift_figure("a <b>", drifts)
    (row,) = figure.to_dict()["vconcat"]
    assert row["title"]["text"] == "a <b>"
    assert len(row["concat"]) == 6
    values = row["concat"][1]["data"]["values"]
    assert [(r["line"], r["x"], r["mean"]) for r in values] == [("<ID>", "W8A8", 0.1), ("<ID>", "W4A4", 0.5)]
    written = write_drift("a <b>", drifts, tmp_path / "drift.svg")
    assert "a <b>" in {e.text for e in ElementTree.parse(written).getroot().iter("{http://www.w3.org/2000/svg}text")}


def test_a_set_without_a_value_leaves_a_gap():
    drifts = {"W8A8": {"ID": summary(0.1), "far": {}}, "W4A4": {"ID": summary(0.5), "far": summary(0.2)}}
    values = drift_figure("t", drifts).to_dict()["vconcat"][0]["concat"][0]["data"]["values"]
    assert [r["mean"] for r in values if r["line"] == "far"] == [None, 0.2]
