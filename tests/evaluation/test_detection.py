"""A detector on images with boxes, in one process: what is measured, kept, compared, and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import quantlens as ql
from detection_cases import by_pycocotools
from detectors import CLASSES, SIDE, detector, pictures
from quantlens.boxes import Boxes, Detections
from quantlens.data import Preprocess, open_source
from quantlens.errors import QuantlensError, StorageError, UnsupportedError
from quantlens.evaluation import outputs
from quantlens.evaluation.compare import Wanted, point
from quantlens.evaluation.detection import class_logits, compare_kept, of_classes
from quantlens.evaluation.foreign_modules import ForeignModule
from quantlens.evaluation.result import Result
from quantlens.metrics import metrics_of, names_of
from quantlens.metrics.detection import COCO
from quantlens.models.detection import DetectionHead, postprocess

pytest.importorskip("faster_coco_eval", reason="mAP needs faster-coco-eval")


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """The float model and two quantized ones on the same images, with what each gave."""
    model, ids, empty = detector(), pictures(), pictures(seed=3, objects=False)
    models = {"FP32": model}
    models |= {
        bits: ql.quantize(model, pictures(seed=9).values, method="minmax", bits=bits) for bits in ("W8A8", "W4A4")
    }
    found = {k: ql.evaluate(m, id=ids, ood={"empty": empty}, batch_size=5, keep=True) for k, m in models.items()}
    return {"model": model, "ids": ids, "results": found, "models": models}


def test_numbers_are_those_of_the_detections_in_pixels_of_the_pictures(measured: dict[str, Any]) -> None:
    pytest.importorskip("pycocotools")
    ids, model = measured["ids"], measured["model"]
    with torch.no_grad():
        given = model.module(ids.values)
    found = postprocess(given["logits"], given["pred_boxes"], ids.sizes, model.detection_head)
    narrow = replace(found, boxes=found.boxes.astype(np.float32), scores=found.scores.astype(np.float32))
    result = measured["results"]["FP32"]
    expected = by_pycocotools(narrow, ids.boxes, len(ids))
    assert {name: result.id[name] for name in COCO} == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert 0.5 < result.id["map"] < result.id["map50"] == pytest.approx(1)
    told = result.to_dict()
    assert told["task"] == "detect"
    assert told["detection"] == {name: told["id"].get(name) for name in ("n", *names_of("detection"))}
    assert told["id"]["num_classes"] == 3
    assert [row["name"] for row in told["id"]["per_class"]] == list(CLASSES)
    json.dumps(told, allow_nan=False)
    assert Result.from_dict(told).to_dict() == told
    assert "mAP % ↑: " in str(result)


def test_quantization_moves_boxes_the_more_the_fewer_bits(measured: dict[str, Any]) -> None:
    fp32, eight, four = (measured["results"][bits].id for bits in ("FP32", "W8A8", "W4A4"))
    assert "matched_iou" not in fp32
    assert 0.95 < eight["matched_iou"] < 1
    assert four["matched_iou"] < eight["matched_iou"]
    assert four["map"] < fp32["map"] - 0.1
    change = measured["results"]["W4A4"].change["id"]
    assert change["map"] == pytest.approx(four["map"] - fp32["map"])
    itself = ql.evaluate(measured["models"]["W8A8"], id=measured["ids"], reference=measured["models"]["W8A8"])
    assert [itself.id[name] for name in ("matched_iou", "lost", "invented", "score_drift")] == [1, 0, 0, 0]


def test_ood_scores_are_of_the_surest_detection_and_of_all_classes(measured: dict[str, Any]) -> None:
    result = measured["results"]["FP32"]
    assert list(result.histograms) == ["max_confidence", "joint_energy"]
    found = result.outputs
    surest = np.zeros(len(measured["ids"]))
    np.maximum.at(surest, found.detections.image, found.detections.scores)
    np.testing.assert_allclose(found.id_scores["max_confidence"], surest, rtol=1e-6)
    assert 0.5 < result.ood["empty"]["max_confidence"]["aupr_out"] <= 1


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_class_has_the_log_odds_of_its_surest_query(scoring: str) -> None:
    logits = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(0)) * 5
    p = logits.double().softmax(-1)[..., :-1] if scoring == "softmax" else logits.double().sigmoid()
    found = class_logits(logits, DetectionHead(scoring, ()))
    torch.testing.assert_close(found.sigmoid(), p.amax(1))
    sure = torch.zeros(1, 1, 3)
    sure[..., 0] = 200
    assert class_logits(sure, DetectionHead(scoring, ())).isfinite().all()


def test_outputs_are_kept_to_the_last_digit_and_compared_with_intervals(
    measured: dict[str, Any], tmp_path: Path
) -> None:
    eight, four = (measured["results"][bits] for bits in ("W8A8", "W4A4"))
    path = tmp_path / "kept.npz"
    path.write_bytes(outputs.pack(four.outputs))
    again = outputs.read(path)
    values = point(again, Wanted([], []))
    expected = {f"id.{name}": four.id[name] for name in metrics_of("detect") if four.id[name] is not None}
    assert values == pytest.approx(expected, rel=1e-12)
    assert set(COCO) <= set(metrics_of("detect", resampled=True))
    found = {one.path: one for group in ql.compare(eight, four, resamples=200).groups for one in group.metrics}
    assert found["id.map"].difference == pytest.approx(four.id["map"] - eight.id["map"])
    assert found["id.map"].high < 0
    assert found["id.matched_iou"].high < 0
    assert found["id.lost"].low is not None
    assert found["ood.empty.max_confidence.auroc"].low is not None


def test_all_of_cocos_numbers_have_intervals_but_those_of_sizes_that_no_object_has(measured: dict[str, Any]) -> None:
    pytest.importorskip("pycocotools")
    eight, four = (measured["results"][bits] for bits in ("W8A8", "W4A4"))
    truth, n = four.outputs.truth, len(measured["ids"])
    expected = {bits: by_pycocotools(r.outputs.detections, truth, n) for bits, r in (("A", eight), ("B", four))}
    assert (expected["A"]["map_small"] is None, expected["A"]["map_large"] is None) == (False, True)
    comparison = ql.compare(eight, four, resamples=200)
    found = {one.path: one for one in comparison.groups[0].metrics}
    for name, value in expected["A"].items():
        if value is None:
            assert f"id.{name}" not in found
            continue
        one = found[f"id.{name}"]
        assert (one.a, one.b) == pytest.approx((value, expected["B"][name]), abs=1e-12), name
        assert one.low <= one.difference <= one.high, name
    json.dumps(comparison.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", ["found.boxes", "truth.image", "drift.lost", "found.labels"])
def test_a_damaged_file_of_outputs_is_said_to_be_one(measured: dict[str, Any], tmp_path: Path, name: str) -> None:
    path = tmp_path / "kept.npz"
    path.write_bytes(outputs.pack(measured["results"]["W4A4"].outputs))
    with np.load(path) as file:
        arrays = dict(file)
    arrays[name] = arrays[name][..., :-1] if arrays[name].ndim > 1 else arrays[name] + 99 * (name == "truth.image")
    if name == "found.labels":
        arrays.pop(name)
    np.savez(path, **arrays)
    with pytest.raises(StorageError, match="damaged"):
        outputs.read(path)


def test_drift_in_a_study_is_that_of_an_evaluation(measured: dict[str, Any], tmp_path: Path) -> None:
    """A cell is measured alone, and compared by what was kept of it and of the FP32 cell."""
    expected = measured["results"]["W4A4"]
    alone = ql.evaluate(measured["models"]["W4A4"], id=measured["ids"], reference=False, keep=True)
    assert "lost" not in alone.id
    (tmp_path / "fp32.npz").write_bytes(outputs.pack(measured["results"]["FP32"].outputs))
    bare = outputs.pack(alone.outputs)
    kept = outputs.read(compare_kept(alone, bare, tmp_path / "fp32.npz"))
    drift = ("matched_iou", "lost", "invented", "score_drift")
    assert [alone.id[name] for name in drift] == [expected.id[name] for name in drift]
    assert set(kept.drift) == set(drift)
    assert compare_kept(alone, bare, tmp_path / "missing.npz") == bare


def test_a_result_as_reference_has_metrics_and_no_boxes(measured: dict[str, Any]) -> None:
    fp32 = measured["results"]["FP32"]
    found = ql.evaluate(measured["models"]["W8A8"], id=measured["ids"], reference=fp32)
    assert found.fp32["id"]["map"] == fp32.id["map"]
    assert "give the FP32 model" in found.metrics_unavailable["lost"]
    fewer = replace(measured["ids"], boxes=measured["ids"].boxes.take(slice(1, None)))
    with pytest.raises(QuantlensError, match="other ID images"):
        ql.evaluate(measured["models"]["W8A8"], id=fewer, reference=fp32)


def test_a_module_is_a_foreign_detector_whose_float_model_says_what_it_gives(measured: dict[str, Any]) -> None:
    class AsTuple(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = self.inner(x)
            return found["logits"], found["pred_boxes"] + 0.01

    model, ids, fp32 = measured["model"], measured["ids"], measured["results"]["FP32"]
    found = ql.evaluate(model.module, id=ids, reference=model)
    assert (found.method, found.task) == ("foreign:torch", "detect")
    assert (found.id["map"], found.id["matched_iou"]) == (fp32.id["map"], 1)
    moved = ql.evaluate(AsTuple(model.module), id=ids, reference=model)
    assert moved.id["map"] < fp32.id["map"]
    assert 0.7 < moved.id["matched_iou"] < 1
    with pytest.raises(UnsupportedError, match=r"measured as a detector.*load_model"):
        ql.evaluate(model.module, id=ids)
    assert ql.evaluate(ForeignModule.float(model), id=ids).id["map"] == fp32.id["map"]


# --- classes ---


def _classes(names: tuple[str, ...], ids: tuple[int, ...], labels: tuple[str, ...]) -> tuple[list[int], list[int]]:
    n = len(names) or len(labels)
    boxes = Boxes(np.arange(n), np.tile([0.0, 0, 1, 1], (n, 1)), np.arange(n), names=names, ids=ids)
    images = replace(pictures(2), boxes=boxes)
    found, listed = of_classes(images, DetectionHead("sigmoid", labels))
    return found.labels.tolist(), listed.tolist()


def test_classes_are_matched_by_name_and_those_without_names_by_number() -> None:
    assert _classes(("cat", "traffic light"), (1, 10), ("N/A", "Traffic_Light", "x", "CAT")) == ([3, 1], [3, 1])
    assert _classes(("couch", "dining table"), (1, 2), ("sofa", "diningtable")) == ([0, 1], [0, 1])
    assert _classes(("a", "b"), (7, 90), ("LABEL_0", "LABEL_1")) == ([0, 1], [0, 1])
    assert _classes(("a", "b"), (1, 3), ("0", "1", "2", "3")) == ([1, 3], [1, 3])
    assert _classes((), (), ("cat", "dog")) == ([0, 1], [0, 1])
    with pytest.raises(QuantlensError, match="boxes of 2 classes that are none of the model's 3"):
        _classes(("a", "b"), ("one", "two"), ("0", "1", "2"))
    for names, ids, labels in [(("a", "b"), (1, 7), ("0", "1", "2")), (("cat", "cow"), (1, 2), ("cat", "dog"))]:
        with pytest.raises(QuantlensError, match=f"boxes of 1 classes that are none of the model's.*'{names[1]}'"):
            _classes(names, ids, labels)


def test_a_detection_of_a_class_that_is_not_annotated_is_not_counted(measured: dict[str, Any]) -> None:
    ids = measured["ids"]
    known = ids.boxes.labels > 0
    boxes = Boxes(
        *(getattr(ids.boxes, name)[known] for name in ("image", "boxes")),
        ids.boxes.labels[known] - 1,
        names=CLASSES[1:],
        ids=(2, 3),
    )
    found = ql.evaluate(measured["model"], id=replace(ids, boxes=boxes), keep=True)
    assert set(np.unique(found.outputs.detections.labels)) == {1, 2}
    own = {row["class"]: row["ap"] for row in measured["results"]["FP32"].id["per_class"]}
    assert {row["class"]: row["ap"] for row in found.id["per_class"]} == pytest.approx({k: own[k] for k in (1, 2)})


# --- bad input ---


def test_what_does_not_fit_is_refused_in_a_sentence(measured: dict[str, Any]) -> None:
    model, ids = measured["model"], measured["ids"]
    none = replace(ids, boxes=ids.boxes.take(slice(0, 0)))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (model, {"id": ids.values}, "has no boxes, and the metrics of task 'detect' need them"),
        (model, {"id": replace(ids, sizes=None)}, "has no boxes"),
        (model, {"id": none}, "no object in 12 images"),
        (model, {"id": ids, "task": "classify"}, "its task is 'detect'"),
        (model, {"id": ids, "scores": ["msp"]}, "msp does not fit the task 'detect'"),
    ]
    for one, given, message in cases:
        with pytest.raises(QuantlensError, match=message):
            ql.evaluate(one, **given)
    classifier = ql.load_model(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIDE * SIDE, 3)),
        preprocess=Preprocess((3, SIDE, SIDE)),
    )
    with pytest.raises(UnsupportedError, match="is no detector"):
        ql.evaluate(classifier, id=ids, task="detect")
    with pytest.raises(QuantlensError, match=r"has boxes and Sequential is no detector .*'classify'.*'pred_boxes'"):
        ql.evaluate(classifier, id=ids)


def test_boxes_that_are_not_finite_are_told_of(measured: dict[str, Any]) -> None:
    values = measured["ids"].values.clone()
    values[7, 0, 0, 1] = np.inf
    broken = replace(measured["ids"], values=values)
    with pytest.raises(QuantlensError, match=r"boxes that are not finite.*first on 7\.png"):
        ql.evaluate(measured["model"], id=broken, batch_size=5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_class_logits_without_probabilities_are_told_of(measured: dict[str, Any], value: float) -> None:
    values = measured["ids"].values.clone()
    values[8, 0, 1, 5] = value
    broken = replace(measured["ids"], values=values)
    with pytest.raises(QuantlensError, match=r"class logits that are not finite.*first on 8\.png"):
        ql.evaluate(measured["model"], id=broken, batch_size=5)


def test_a_file_without_boxes_is_told_of(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "val").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "val" / "a.png")
    listed = {"images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 20}], "annotations": []}
    (tmp_path / "instances_val.json").write_text(json.dumps(listed | {"categories": [{"id": 1, "name": "cat"}]}))
    with pytest.raises(QuantlensError, match="no object in 1 images to be found"):
        ql.evaluate(detector(), id=f"coco:{tmp_path}")


@pytest.mark.real
@pytest.mark.slow
def test_a_detector_of_hugging_face_on_coco(shared_data: Path, tmp_path: Path) -> None:
    """Random weights, so that only the way is tried; the annotations themselves, given as detections, are perfect."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (quantlens[hf])")
    source = open_source(f"coco:{shared_data}/coco?split=val2017&n=16")
    names = dict.fromkeys(range(91), "N/A") | dict(zip(source.boxes.ids, source.boxes.names, strict=True))
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    small |= {"image_size": [64, 64], "patch_size": 16, "num_detection_tokens": 7, "id2label": names}
    torch.manual_seed(0)
    module = transformers.YolosForObjectDetection(transformers.YolosConfig(**small)).eval()
    model = ql.load_model(module, preprocess=Preprocess((3, 64, 64), resize=(64, 64)))
    qmodel = ql.quantize(model, f"coco:{shared_data}/coco?split=train2017&n=4", method="minmax", bits="W4A4")
    result = ql.evaluate(qmodel, id=source, cache_dir=False, keep=True)
    assert result.id["n"] == 16
    truth = result.outputs.truth
    perfect = Detections(truth.image, truth.boxes, np.ones(len(truth)), truth.labels)
    from quantlens.metrics import detection_metrics

    assert detection_metrics(perfect, truth, 16, names=model.detection_head.labels)["map"] == pytest.approx(1)


@pytest.mark.slow
def test_a_trained_detector_has_the_numbers_of_the_other_library() -> None:
    pytest.importorskip("pycocotools")
    found = ql.evaluate(
        "scenes-detr", id="embedded:scenes[:96]", ood={"unknown": "embedded:scenes-unknown[:96]"}, keep=True
    )
    kept = found.outputs
    expected = by_pycocotools(kept.detections, kept.truth, 96)
    assert {name: found.id[name] for name in COCO} == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert found.id["map"] > 0.55
    assert found.id["map50"] > 0.85
    assert found.ood["unknown"]["max_confidence"]["aupr_out"] > 0.8
