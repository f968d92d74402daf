"""Metrics of detectors: against COCO's own evaluation, torchmetrics and uq-detr, and what must hold of any."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from detection_cases import by_pycocotools, make
from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.metrics import METRICS, Boxes, Detections, box_drift, detection_metrics, matching, names_of
from quantlens.metrics.detection import (
    COCO,
    CONFIDENT,
    coco_metrics,
    detection_calibration_error,
    object_calibration,
    resampled_detections,
)
from quantlens.metrics.matching import iou, match

pytest.importorskip("faster_coco_eval", reason="mAP needs faster-coco-eval")

N = 12
SEEDS = st.integers(0, 2**20)
FEW = settings(max_examples=8, deadline=None)


def perfect(boxes: Boxes, score: float = 0.9) -> Detections:
    """A detection for every object that is no crowd."""
    of = boxes.take(~boxes.crowd)
    return Detections(of.image, of.boxes, np.full(len(of), score), of.labels)


def from_matches(detections: Detections, boxes: Boxes, drawn: Any, wanted: Any = COCO) -> dict[str, np.ndarray]:
    ratios = {"oce": object_calibration(detections, boxes, len(drawn))}
    return resampled_detections(match(detections, boxes), drawn, n_bins=15, wanted=wanted, ratios=ratios)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in COCO:
        assert (found[name] is None) == (expected[name] is None), name
        assert found[name] == pytest.approx(expected[name], abs=1e-12), name


# --- the libraries ---


@pytest.mark.parametrize("seed", range(8))
def test_coco_numbers_are_those_of_both_libraries_and_of_the_matches(seed: int) -> None:
    pytest.importorskip("pycocotools")
    detections, boxes = make(seed, ties=seed % 2 == 0)
    found = coco_metrics(detections, boxes, N)
    same(found, by_pycocotools(detections, boxes, N))
    own = from_matches(detections, boxes, np.ones((N, 1)))
    same({name: None if np.isnan(v[0]) else float(v[0]) for name, v in own.items()}, found)


@pytest.mark.slow
def test_classes_of_the_table_are_those_of_torchmetrics() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("pycocotools")
    detection = pytest.importorskip("torchmetrics.detection")
    detections, boxes = make(5, crowd=False, ties=False)
    recalls = np.linspace(0, 1, 101).tolist()  # its own are those of float32, one of which lies above 7 / 25
    metric = detection.MeanAveragePrecision(class_metrics=True, rec_thresholds=recalls)
    for k in range(N):
        one, two = detections.take(detections.image == k), boxes.take(boxes.image == k)
        found = {"boxes": one.boxes, "scores": one.scores, "labels": one.labels}
        true = {"boxes": two.boxes, "labels": two.labels, "area": two.area}
        metric.update(*([{key: torch.from_numpy(v) for key, v in part.items()}] for part in (found, true)))
    expected = metric.compute()
    found = detection_metrics(detections, boxes, N, names=["a", "b", "c", "d"])
    by_class = dict(zip(expected["classes"].tolist(), expected["map_per_class"].tolist(), strict=True))
    assert {row["class"]: row["ap"] for row in found["per_class"]} == pytest.approx(
        {k: v for k, v in by_class.items() if v >= 0}, abs=1e-6
    )
    assert found["map"] == pytest.approx(float(expected["map"]), abs=1e-6)
    assert np.mean([row["ap"] for row in found["per_class"]]) == pytest.approx(found["map"])
    assert np.mean([row["ap50"] for row in found["per_class"]]) == pytest.approx(found["map50"])
    assert [row["name"] for row in found["per_class"]] == ["a", "b", "c", "d"]
    assert sum(row["n"] for row in found["per_class"]) == found["n_boxes"] == len(boxes)


@pytest.mark.parametrize("seed", range(4))
def test_calibration_of_objects_is_that_of_uq_detr(seed: int) -> None:
    uq = pytest.importorskip("uq_detr")
    detections, boxes = make(seed, crowd=False)
    sure = detections.take(detections.scores > CONFIDENT)
    found = [uq.Detections(one.boxes, one.scores, one.labels) for one in (sure.take(sure.image == k) for k in range(N))]
    true = [uq.GroundTruth(one.boxes, one.labels) for one in (boxes.take(boxes.image == k) for k in range(N))]
    with pytest.warns(UserWarning, match="1-D"):
        expected = uq.oce(found, true).score
    assert detection_metrics(detections, boxes, N)["oce"] == pytest.approx(expected)


def test_detection_calibration_error_is_that_of_uq_detr_where_their_bins_agree() -> None:
    uq = pytest.importorskip("uq_detr")
    rng = np.random.default_rng(0)
    scores = np.concatenate([[0.0, 1.0], rng.random(300)])  # its bins reach from the smallest to the largest score
    correct = rng.random(302) < scores**2
    spot = np.tile([0.0, 0, 10, 10], (302, 1))
    found = [uq.Detections(spot[:1], scores[k : k + 1], [0]) for k in range(302)]
    true = [uq.GroundTruth(spot[:1] if hit else np.empty((0, 4)), [0] if hit else []) for hit in correct]
    expected = uq.dece(found, true, tp_criterion="greedy", n_bins=25).score
    assert detection_calibration_error(scores, correct, n_bins=25) == pytest.approx(expected)


def test_detection_calibration_error_by_place_sees_what_the_mean_hides() -> None:
    """Sure on the left and unsure on the right, right half of the time on both sides."""
    boxes = np.tile([[0.0, 0, 10, 10], [80, 0, 90, 10]], (50, 1))
    scores = np.full(100, 0.5)
    correct = np.tile([1, 0], 50)
    assert detection_calibration_error(scores, correct) == pytest.approx(0)
    sizes = np.tile([100, 100], (100, 1))
    assert detection_calibration_error(scores, correct, boxes=boxes, sizes=sizes) == pytest.approx(0.5)
    assert detection_calibration_error(scores, correct, boxes=boxes, sizes=sizes, least=51) is None
    with pytest.raises(QuantlensError, match=r"scores in 0\.\.1"):
        detection_calibration_error([1.5], [1])


# --- what must hold ---


@FEW
@given(SEEDS)
def test_perfect_detections_have_all_of_it(seed: int) -> None:
    _, boxes = make(seed)
    if boxes.crowd.all():
        return
    found = detection_metrics(perfect(boxes, 1.0), boxes, N)
    assert [found[name] for name in ("map", "map50", "map75", "mar_100")] == pytest.approx([1.0] * 4)
    assert found["d_ece"] == pytest.approx(0)
    drift = {name: top.sum() / bottom.sum() for name, (top, bottom) in box_drift(*[perfect(boxes)] * 2, N).items()}
    assert drift == pytest.approx({"matched_iou": 1, "lost": 0, "invented": 0, "score_drift": 0})


@FEW
@given(SEEDS)
def test_wrong_detections_below_all_others_change_nothing_and_above_all_others_do_harm(seed: int) -> None:
    detections, boxes = make(seed, ties=False)
    spot = np.tile([900.0, 900, 950, 950], (N, 1))
    away = [Detections(np.arange(N), spot, np.full(N, score), np.zeros(N)) for score in (0.0, 2.0)]
    drawn = np.ones((N, 1))
    before, below, above = (
        from_matches(Detections.joined([detections, *more]), boxes, drawn) for more in ([], away[:1], away[1:])
    )
    for name in ("map", "map50", "map75"):
        assert below[name] == pytest.approx(before[name], nan_ok=True)
        assert not above[name] > before[name] + 1e-12


@FEW
@given(SEEDS)
def test_the_order_of_images_and_of_rows_does_not_matter(seed: int) -> None:
    detections, boxes = make(seed, ties=False)
    rng = np.random.default_rng(seed)
    images, rows = rng.permutation(N), rng.permutation(len(detections))
    once, wanted = np.ones((N, 1)), (*COCO, "d_ece", "oce")
    found = from_matches(detections.take(rows).select(images), boxes.select(images), once, wanted)
    for name, values in from_matches(detections, boxes, once, wanted).items():
        assert found[name] == pytest.approx(values, nan_ok=True), name


@pytest.mark.parametrize("seed", range(3))
def test_a_resample_has_the_metrics_of_the_images_that_were_drawn(seed: int) -> None:
    detections, boxes = make(seed, ties=False)
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, N, (4, N))
    drawn = np.stack([np.bincount(r, minlength=N) for r in rows], axis=1).astype(np.float32)
    found = from_matches(detections, boxes, drawn, (*COCO, "d_ece", "oce"))
    for k, images in enumerate(np.sort(rows)):
        expected = detection_metrics(detections.select(images), boxes.select(images), N)
        for name, values in found.items():
            assert values[k] == pytest.approx(np.nan if expected[name] is None else expected[name], nan_ok=True), name


def test_drift_counts_what_is_lost_invented_and_moved() -> None:
    spots = np.array([[0.0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 10, 10], [40, 0, 50, 10]])
    image, labels = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 0])
    before = Detections(image, spots, [0.9, 0.8, 0.7, 0.31], labels)
    moved = spots + np.array([[0, 0, 0, 0], [5, 0, 5, 0], [0, 0, 0, 10], [0, 0, 0, 0]])
    after = Detections([0, 0, 1, 1, 2], [*moved, spots[0]], [0.8, 0.8, 0.9, 0.3, 0.95], [0, 1, 0, 0, 0])
    drift = box_drift(after, before, 3)
    # the second moved by half its width (IoU 1/3), the third grew to twice its height (IoU 1/2), the fourth is no
    # longer confident, the fifth is new
    assert {k: float(top.sum()) for k, (top, _) in drift.items()} == pytest.approx(
        {"matched_iou": 1.5, "lost": 2, "invented": 2, "score_drift": 0.1}
    )
    assert [float(bottom.sum()) for _, bottom in drift.values()] == [2, 4, 4, 2]
    assert drift["invented"][0].tolist() == [1, 0, 1]
    other = Detections(before.image, before.boxes, before.scores, 1 - before.labels)
    assert box_drift(other, before, 3)["matched_iou"][1].sum() == 0


def test_every_number_is_in_the_registry() -> None:
    detections, boxes = make(0)
    found = detection_metrics(detections, boxes, N)
    numbers = {name for name, value in found.items() if isinstance(value, float)}
    assert numbers <= set(names_of("detection"))
    assert set(names_of("detection")) - numbers <= {"matched_iou", "lost", "invented", "score_drift"}
    assert (METRICS["map"].direction, METRICS["lost"].direction, METRICS["score_drift"].direction) == (
        "higher",
        "lower",
        None,
    )


# --- bad and empty input ---


def test_a_detector_that_finds_nothing_is_measured() -> None:
    _, boxes = make(3)
    none = Detections([], [], [], [])
    found = detection_metrics(none, boxes, N)
    same(found, by_pycocotools(none, boxes, N))
    assert found["d_ece"] is None
    assert found["oce"] == 1
    assert "reliability" not in found
    assert box_drift(none, perfect(boxes), N)["lost"][0].sum() == np.count_nonzero(~boxes.crowd)
    assert box_drift(perfect(boxes), none, N)["invented"][0].sum() == np.count_nonzero(~boxes.crowd)


def _edges() -> dict[str, tuple[Detections, Boxes]]:
    detections, boxes = make(1)
    few = boxes.take(boxes.image == boxes.image[0])
    flat = Boxes(boxes.image, boxes.boxes[:, [0, 1, 0, 3]], boxes.labels)
    borders = Boxes([0, 0, 1], [[0, 0, 32, 32], [50, 50, 146, 146], [0, 0, 32, 32]], [0, 0, 0])
    return {
        "images without objects": (detections, few),
        "no area": (replace(detections, boxes=detections.boxes[:, [0, 1, 0, 1]]), boxes),
        "negative sides": (replace(detections, boxes=detections.boxes[:, [2, 3, 0, 1]]), boxes),
        "objects without area": (detections, Boxes.joined([boxes, flat])),
        "one score": (replace(detections, scores=np.full(len(detections), 0.5)), boxes),
        "one class": (replace(detections, labels=detections.labels * 0), replace(boxes, labels=boxes.labels * 0)),
        "a class of crowds": (detections, replace(boxes, crowd=boxes.crowd | (boxes.labels == 0))),
        "all twice": (Detections.joined([detections] * 2), Boxes.joined([boxes] * 2)),
        "borders of sizes": (perfect(borders), borders),
    }


@pytest.mark.parametrize("case", _edges())
def test_numbers_at_the_edges_are_cocos(case: str) -> None:
    pytest.importorskip("pycocotools")
    detections, boxes = _edges()[case]
    found = coco_metrics(detections, boxes, N)
    same(found, by_pycocotools(detections, boxes, N))
    own = from_matches(detections, boxes, np.ones((N, 1)))
    same({name: None if np.isnan(v[0]) else float(v[0]) for name, v in own.items()}, found)


def test_overlaps_in_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crowded images are looked at in parts, so that memory does not grow with boxes times boxes."""
    detections, boxes = make(2)
    whole = [detection_metrics(detections, boxes, N), box_drift(detections, perfect(boxes), N)]
    most, sizes = 5, []
    monkeypatch.setattr(matching, "AT_ONCE", most)
    monkeypatch.setattr(matching, "iou", lambda a, b, crowd=False: (sizes.append(len(a)), iou(a, b, crowd))[1])
    assert matching.partners(detections, boxes, 0.5).max() >= 0
    assert len(sizes) > 1
    assert max(sizes) < most + np.bincount(boxes.image).max()
    parts = [detection_metrics(detections, boxes, N), box_drift(detections, perfect(boxes), N)]
    np.testing.assert_equal(parts, whole)


def test_what_cannot_be_measured_is_refused_in_a_sentence() -> None:
    detections, boxes = make(0)
    cases = [
        (detections, boxes.take(np.zeros(len(boxes), bool)), N, "no box in 12 images"),
        (detections, boxes, 3, "there are 3 images, and boxes of image 11"),
        (Detections(detections.image, detections.boxes, detections.scores * 9, detections.labels), boxes, N, "0..1"),
    ]
    for one, two, n, message in cases:
        with pytest.raises(QuantlensError, match=message):
            detection_metrics(one, two, n)
    for rows, message in [
        (([0], [[0, 0, 1, np.nan]], [0.5], [0]), "1 of 1 boxes have NaN"),
        (([0], [[0, 0, 1, 1]], [np.inf], [0]), "1 of 1 boxes have NaN or infinite scores"),
        (([0], [[0, 0, 1]], [0.5], [0]), r"1 boxes have shape \(1, 3\)"),
        (([0, 1], [[0, 0, 1, 1]] * 2, [0.5], [0, 0]), r"2 boxes have scores of shape \(1,\)"),
        (([-1], [[0, 0, 1, 1]], [0.5], [0]), "-1 is no index of an image"),
    ]:
        with pytest.raises(QuantlensError, match=message):
            Detections(*rows)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'quantlens\[detection\]'"):
        coco_metrics(*make(0), N)


@pytest.mark.real
def test_real_boxes(shared_data: Path) -> None:
    """COCO's own boxes, moved and lost at random."""
    pytest.importorskip("pycocotools")
    from quantlens.data import open_source

    source = open_source(f"coco:{shared_data}/coco?split=val2017")
    boxes, rng = source.boxes, np.random.default_rng(0)
    of = np.flatnonzero(rng.random(len(boxes)) < 0.8)
    sides = np.tile(boxes.boxes[of, 2:] - boxes.boxes[of, :2], 2)
    moved = boxes.boxes[of] + rng.normal(0, 0.06, sides.shape) * sides
    detections = Detections(boxes.image[of], moved, rng.random(len(of)), boxes.labels[of])
    found = detection_metrics(detections, boxes, len(source), names=boxes.names)
    same(found, by_pycocotools(detections, boxes, len(source)))
    assert 0.3 < found["map"] < found["map50"] < 0.85
    assert {row["name"] for row in found["per_class"]} >= {"person", "airplane"}
