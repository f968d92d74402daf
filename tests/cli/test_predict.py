"""`quantlens predict` of detectors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from quantlens.data import open_source
from quantlens.metrics.matching import iou


@pytest.fixture
def pictures(tmp_path):
    """Three scenes, the last one wider than high, two of one name; and the boxes of each in its pixels."""
    source = open_source("embedded:scenes[3:6]")
    paths = [tmp_path / name for name in ("a.png", "b.png", "more/a.png")]
    paths[2].parent.mkdir()
    boxes = [source.boxes.take(source.boxes.image == k) for k in range(3)]
    for k, path in enumerate(paths):
        source.image(k).resize((96, 96) if k < 2 else (288, 192)).save(path)
    return paths, [
        (b.boxes * (1 if k < 2 else [3, 2, 3, 2]), [b.names[i] for i in b.labels]) for k, b in enumerate(boxes)
    ]


@pytest.mark.slow
def test_objects_are_told_and_drawn(run, pictures, tmp_path) -> None:
    paths, truth = pictures
    out, broken = tmp_path / "drawn", tmp_path / "broken.png"
    broken.write_text("no picture")
    code, text, err = run("predict", "scenes-detr", *map(str, (*paths, broken)), "--json", "--out", str(out))
    assert (code, "broken.png" in "".join(err.split())) == (1, True)
    *found, bad = json.loads(text)
    assert set(bad) == {"image", "error"}
    hits = 0
    for one, (boxes, labels), path in zip(found, truth, paths, strict=True):
        assert one["image"] == str(path)
        for thing in one["objects"]:
            assert set(thing) == {"label", "score", "box"}
            assert 0.5 <= thing["score"] <= 1
            overlap = iou(np.repeat([thing["box"]], len(boxes), 0), boxes)
            hits += any(o > 0.6 and label == thing["label"] for o, label in zip(overlap, labels, strict=True))
    assert hits >= 0.8 * sum(len(labels) for _, labels in truth)
    assert [one["drawn"] for one in found] == [str(out / name) for name in ("a.png", "b.png", "a-2.png")]
    for one, path in zip(found, paths, strict=True):
        before, after = (np.asarray(Image.open(p).convert("RGB")) for p in (path, one["drawn"]))
        assert before.shape == after.shape
        assert (before != after).any()


@pytest.mark.slow
def test_a_checkpoint_says_what_it_says_at_its_bits(run, pictures, tmp_path) -> None:
    paths, _ = pictures
    file = tmp_path / "q.safetensors"
    images = "embedded:scenes-calibration[0:4]"
    code, _, err = run("quantize", "scenes-yolos", "--calibration", images, "--method", "minmax", "--out", str(file))
    assert code == 0, err
    code, text, err = run("predict", str(file), str(paths[0]), "--threshold", "0.05")
    assert (code, "score" in text) == (0, True), err
    code, text, _ = run("predict", str(file), str(paths[0]), "--threshold", "1")
    assert (code, "–" in text) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("digits-vit", "a.png"), "digits-vit is no detector"),
        (("scenes-dter", "a.png"), "did you mean 'scenes-detr'"),
        (("scenes-detr", "a.png", "--threshold", "50"), "--threshold"),
    ],
    ids=str,
)
def test_mistakes(run, arguments, said) -> None:
    code, _, err = run("predict", *arguments)
    assert code == 2
    assert said in " ".join(err.split())
