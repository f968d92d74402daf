"""The report's section on boxes."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from quantlens.boxes import Boxes, Detections
from quantlens.evaluation import outputs as kept
from quantlens.report.boxes import boxes
from quantlens.studies.board import Board, Group

TRUTH = [[0, 10, 10, 40, 40], [1, 5, 5, 25, 25], [1, 50, 30, 90, 60], [2, 0, 0, 90, 60]]
LABELS = [0, 0, 1, 1]


def study(tmp_path: Path) -> Board:
    """A detector that is right, and its quantized version that calls one object by another name, finds one twice and
    misses one; image 2 has a crowd alone."""
    pictures = tmp_path / "coco" / "val"
    pictures.mkdir(parents=True)
    for k in range(3):
        Image.new("RGB", (100, 70), (60 * k, 90, 90)).save(pictures / f"{k}.png")
    annotations = [
        {"image_id": i, "category_id": label, "bbox": [a, b, c - a, d - b], "iscrowd": int(i == 2)}
        for (i, a, b, c, d), label in zip(TRUTH, LABELS, strict=True)
    ]
    images = [{"id": k, "file_name": f"{k}.png", "width": 100, "height": 70} for k in range(3)]
    categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    listed = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "coco" / "instances_val.json").write_text(json.dumps(listed))
    rows = np.array(TRUTH)
    truth = Boxes(rows[:, 0], rows[:, 1:], LABELS, np.array([0, 0, 0, 1], dtype=bool))
    places = {
        "FP32": ([0, 1, 1], [1, 2, 3], [0, 0, 1], [0.9, 0.8, 0.7]),
        "W4A4": ([0, 1, 1, 1, 1], [1, 2, 2, 2, 3], [1, 0, 0, 0, 1], [0.9, 0.8, 0.6, 0.2, 0.25]),
    }
    results = {}
    for bits, (image, of, labels, scores) in places.items():
        found = Detections(image, rows[np.array(of) - 1, 1:], scores, labels)
        sets = {"id": {"fingerprint": "f"}, "ood": {}, "task": "detect", "n_bins": 15, "seed": 0}
        about = {**sets, "model": "m", "method": "minmax", "bits": bits}
        one = kept.Outputs(np.full(3, -1), {"s": np.zeros(3)}, {}, about, detections=found, truth=truth)
        path = kept.path_of(tmp_path, bits.lower())
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(kept.pack(one))
        names = [{"class": 0, "name": "cat"}, {"class": 1, "name": "dog"}]
        part = {"source": f"coco:{tmp_path / 'coco'}", "per_class": names, "map": 0.5}
        results[bits] = {"task": "detect", "seed": 0, "id": part, "cell_key": bits.lower()}
    group = Group("m", "minmax", {}, cells={"W4A4": [results["W4A4"]]}, fp32=results["FP32"], fp32_own=True)
    return Board([group], [], [], {}, directory=tmp_path)


def test_pictures_tell_what_is_right_wrong_and_missed(tmp_path: Path) -> None:
    section = boxes(study(tmp_path))
    assert section is not None
    assert [g["title"] for g in section["shown"]] == ["Image 0", "Image 1"]  # image 2 has no object of its own
    ((_, _, (fp32, w4a4)),) = section["shown"][0]["rows"]
    assert (fp32["label"], fp32["changed"]) == ("1 right, 0 wrong, 0 missed", False)
    assert (w4a4["label"], w4a4["changed"]) == ("0 right, 1 wrong, 1 missed", True)
    ((_, _, (fp32, w4a4)),) = section["shown"][1]["rows"]
    assert fp32["label"] == "2 right, 0 wrong, 0 missed"
    assert w4a4["label"] == "1 right, 1 wrong, 1 missed"  # twice; those below the threshold are none
    assert section["shown"][1]["truth"]["label"] == "2 objects"
    picture = Image.open(io.BytesIO(base64.b64decode(w4a4["uri"].partition(",")[2])))
    assert picture.width / picture.height == pytest.approx(100 / 70, rel=0.02)
    assert np.asarray(picture.convert("RGB")).std() > 5


def test_without_its_images_the_section_says_why(tmp_path: Path) -> None:
    board = study(tmp_path)
    (tmp_path / "coco" / "val" / "0.png").unlink()
    section = boxes(board)
    assert section is not None
    assert "cannot be read here" in section["reason"]


def test_other_boxes_are_not_shown_as_those_that_were_evaluated(tmp_path: Path) -> None:
    board = study(tmp_path)
    file = tmp_path / "coco" / "instances_val.json"
    file.write_text(file.read_text().replace("[10, 10,", "[11, 10,"))
    section = boxes(board)
    assert section is not None
    assert "other boxes than those that were evaluated" in section["reason"]


def test_without_outputs_or_detectors_there_is_no_section(tmp_path: Path) -> None:
    board = study(tmp_path)
    kept.path_of(tmp_path, "w4a4").unlink()
    section = boxes(board)
    assert section is not None
    assert section["shown"][0]["rows"][0][2][1] is None
    kept.path_of(tmp_path, "fp32").unlink()
    assert boxes(board) is None
    assert boxes(SimpleNamespace(task="classify", directory=tmp_path)) is None  # type: ignore[arg-type]
