"""The report of a study of detectors."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from report_fakes import FakeStore

import quantlens as ql
from detectors import detector, pictures
from quantlens.plots.cells import reliability_rows
from quantlens.report import write_report
from quantlens.report.tables import class_tables, table_1
from quantlens.studies.board import collect
from quantlens.studies.text import metric_heading


def of_detectors(store: FakeStore) -> FakeStore:
    """The cells as if they were of detectors: what they have lost of top-1 they have lost of mAP."""
    cells = deepcopy(store.listed)
    for cell in cells:
        if cell.result is None or "id" not in cell.result:
            continue
        top1 = cell.result["id"]["top1"]
        found = {"map": top1 / 2, "map50": top1, "d_ece": 0.1, "oce": 0.3, "n": 40}
        if cell.spec["bits"] != "FP32":
            found |= {"matched_iou": 0.9, "lost": 0.25, "invented": 0.125, "score_drift": -0.02}
        found["per_class"] = [{"class": 0, "name": "cat", "n": 7, "ap": top1 / 2, "ap50": top1}]
        cell.result["id"] = {**{k: cell.result["id"][k] for k in ("source", "fingerprint")}, **found}
        cell.result["task"] = "detect"
    return FakeStore(cells, store.config, store.name)


def test_tables_are_of_map_and_of_what_happens_to_boxes(full_store: FakeStore) -> None:
    store = of_detectors(full_store)
    board = collect(store.cells(), store.study())
    captions = {table["caption"]: table for table in table_1(board)}
    first = next(iter(captions.values()))
    assert [title for title, _ in first["heads"]] == ["mAP % ↑", "mAP@.5 % ↑"]
    drift = next(table for caption, table in captions.items() if "boxes" in caption)
    row = drift["rows"][0]["cells"]
    fp32, *others = row[: len(row) // 2]
    assert fp32["text"] == "–"
    assert {cell["text"] for cell in others} <= {"0.9000", "–"}
    assert "0.9000" in {cell["text"] for cell in others}
    assert not any("top-1" in caption.lower() for caption in captions)
    assert class_tables(board)[0]["rows"][0][:3] == ["0", "cat", "7"]


def test_the_reliability_of_a_detector_is_of_its_detections(small_store: FakeStore, tmp_path: Path) -> None:
    bins = {"confidence": [0.4, 0.8], "accuracy": [0.5, 0.75], "count": [1, 3]}
    group = SimpleNamespace(first=lambda bits: {"id": {"d_ece": 0.125, "reliability": bins}})
    rows = list(reliability_rows(group, "W8A8"))
    assert [(row["ece"], row["share"]) for row in rows] == [("D-ECE W8A8 12.5 %", 25), ("D-ECE W8A8 12.5 %", 75)]
    html = write_report(of_detectors(small_store), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Average precision and calibration by precision" in html
    assert "Accuracy and calibration" not in html


def test_a_title_that_begins_with_a_small_letter_for_a_reason_keeps_it() -> None:
    assert metric_heading("map") == "mAP % ↑"
    assert metric_heading("top1") == "Top-1 % ↑"


def test_the_card_of_a_detector_is_one_of_object_detection() -> None:
    pytest.importorskip("faster_coco_eval", reason="mAP needs faster-coco-eval")
    model, images = detector(), pictures(seed=9).values
    qmodel = ql.quantize(model, images, "minmax", "W8A8")
    kept = ql.evaluate(qmodel, pictures(), {"empty": pictures(seed=3, objects=False)}, keep="scores")
    about = yaml.safe_load(ql.card(qmodel, kept).split("---\n")[1])
    assert about["pipeline_tag"] == "object-detection"
    (one,) = about["model-index"]
    assert {result["task"]["type"] for result in one["results"]} == {"object-detection"}
    values = {metric["type"]: metric["value"] for metric in one["results"][0]["metrics"]}
    assert values["map"] == kept.id["map"]
    assert "map_large" not in values
    text = ql.card(qmodel, kept)
    assert "3 classes, and boxes" in text
    assert "95 % intervals are those of 2000 bootstrap resamples" in text
    low = text.partition(f"mAP % ↑ | {100 * kept.id['map']:.2f} (")[2].partition(" to ")[0]
    assert 0 < float(low) < 100 * kept.id["map"]
    assert "and without intervals, as the outputs" in ql.card(qmodel, kept.to_dict())
