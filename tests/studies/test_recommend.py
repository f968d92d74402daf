"""`recommend`: what it answers is inside the budget, comes from what it tried, and can be made again."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest

import quantlens as ql
from detectors import detector, pictures
from quantlens.cli import _common
from quantlens.cli.main import run
from quantlens.cli.recommend import _parts, read_loss
from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.studies.recommend import _Search

ID, CALIBRATION = "embedded:digits-test", "embedded:digits-calibration"


@pytest.fixture(scope="module")
def found():
    return ql.recommend("digits-vit", ID, calibration=CALIBRATION, target=None, methods=["minmax", "repq-vit"])


@pytest.mark.slow
def test_the_smallest_is_inside_and_no_tried_one_is_smaller(found) -> None:
    inside = [trial for trial in found.trials if trial.inside]
    assert found.smallest in inside
    assert found.smallest.size_mb == min(trial.size_mb for trial in inside)
    assert all(trial.change >= -found.max_loss for trial in inside)
    assert found.smallest.low <= found.smallest.change <= found.smallest.high


def test_bits_fall_and_a_dearer_method_goes_on_where_the_cheaper_left_the_budget(found) -> None:
    widths = {m: [int(t.bits[1]) for t in found.trials if t.method == m] for m in ("minmax", "repq-vit")}
    assert widths["minmax"] == sorted(widths["minmax"], reverse=True)
    assert widths["minmax"][0] == 8
    assert widths["repq-vit"][0] == widths["minmax"][-1]


def test_a_setting_that_is_surely_outside_is_given_up_early(found) -> None:
    hopeless = [trial for trial in found.trials if trial.change < -0.5]
    assert hopeless
    assert all(trial.n < found.n for trial in hopeless)


def test_the_command_makes_the_model_that_was_measured(found, tmp_path) -> None:
    words = shlex.split(found.smallest.command)
    out = tmp_path / "again.safetensors"
    assert run([*words[1:], "--out", str(out), "--quiet"]) == 0
    again = ql.evaluate(ql.load(out), ID, reference=ql.load_model("digits-vit"))
    assert again.change["id"]["top1"] == pytest.approx(found.smallest.change)


@pytest.mark.slow
def test_without_calibration_images_some_of_the_id_set_are_set_aside() -> None:
    found = ql.recommend("digits-vit", f"{ID}[:120]", target=None, methods=["minmax"], max_loss=0.5)
    assert found.n == 120 - 32
    assert "--n 32" in found.smallest.command


@pytest.mark.slow
def test_time_that_is_up_ends_the_search_with_what_there_is() -> None:
    found = ql.recommend("digits-vit", ID, calibration=CALIBRATION, target=None, methods=["minmax"], minutes=0)
    assert found.smallest is None
    assert any("minutes" in note for note in found.notes)


def test_mistakes_are_told() -> None:
    with pytest.raises(UnknownNameError, match="minmx"):
        ql.recommend("digits-vit", ID, methods=["minmx"])
    with pytest.raises(QuantlensError, match="max_loss"):
        ql.recommend("digits-vit", ID, max_loss=1.5)
    with pytest.raises(QuantlensError, match="--max-loss"):
        read_loss("one point")
    with pytest.raises(UnknownNameError, match="tensorrt"):
        ql.recommend("digits-vit", f"{ID}[:40]", calibration=CALIBRATION, target="tensorrt", methods=["minmax"])


@pytest.mark.parametrize(("text", "value"), [("1pt", 0.01), ("0.5 pts", 0.005), ("2%", 0.02), ("0.01", 0.01)])
def test_a_loss_is_read(text: str, value: float) -> None:
    assert read_loss(text) == pytest.approx(value)


@pytest.mark.slow
def test_files_are_timed_and_the_fastest_is_one_of_them(tmp_path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "found.json"
    arguments = ["--id", f"{ID}[:100]", "--calibration", CALIBRATION, "--methods", "minmax", "--max-loss", "50%"]
    assert run(["recommend", "digits-vit", *arguments, "--target", "onnxruntime-cpu", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    timed = [trial for trial in found["trials"] if trial["milliseconds"] is not None]
    assert found["fastest"]["milliseconds"] == min(trial["milliseconds"] for trial in timed)
    assert np.isfinite(found["fastest"]["change"])


@pytest.mark.slow
def test_too_few_images_and_images_of_the_calibration_are_refused() -> None:
    with pytest.raises(QuantlensError, match="fewer than 30"):
        ql.recommend("digits-vit", f"{ID}[:40]", target=None, methods=["minmax"])
    with pytest.raises(QuantlensError, match=r"^8 images are given to measure on, and nothing .* than 30: give more$"):
        ql.recommend("digits-vit", f"{ID}[:8]", calibration=CALIBRATION, target=None, methods=["minmax"])
    with pytest.raises(QuantlensError, match="draws a sample, of which none can be set aside"):
        ql.recommend("digits-vit", f"{ID}?n=200&seed=0", target=None, methods=["minmax"])
    with pytest.raises(QuantlensError, match="share"):
        ql.recommend("digits-vit", ID, calibration=ID, target=None, methods=["minmax"])
    with pytest.raises(QuantlensError, match="no method"):
        ql.recommend("digits-vit", ID, target=None, methods=[])


@pytest.mark.slow
def test_an_interval_that_reaches_below_the_budget_is_told() -> None:
    found = ql.recommend("digits-vit", f"{ID}[:40]", calibration=CALIBRATION, target=None, methods=["minmax"])
    assert found.smallest.low < -found.max_loss
    assert any("more images" in note for note in found.notes)


@pytest.mark.slow
def test_a_module_of_ones_own_gets_the_call_in_python() -> None:
    module = ql.load_model("digits-vit").module
    model = ql.load_model(module, preprocess=ql.load_model("digits-vit").preprocess)
    found = ql.recommend(model, f"{ID}[:40]", calibration=CALIBRATION, target=None, methods=["minmax"])
    assert found.smallest.command.startswith("ql.quantize(model, calibration, 'minmax', ")


def test_the_command_says_a_size_that_the_name_does_not() -> None:
    model = ql.load_model("vit_tiny_patch16_224", "random", input_size=32)
    search = _Search(model, 0.01, 0, 0.0, None)
    search.calibration_source, search.calibration = "images:x", range(4)
    start = "quantlens quantize vit_tiny_patch16_224 --weights random --input-size 32 --calibration images:x --n 4 "
    assert search._command("minmax", "W8A8", None).startswith(start)


def test_the_command_says_that_pictures_are_seen_whole() -> None:
    search = _Search(ql.load_model("scenes-detr", letterbox=True), 0.01, 0, 0.0, None)
    search.calibration_source, search.calibration = "images:x", range(4)
    words = shlex.split(search._command("minmax", "W8A8", "openvino-cpu"))
    assert "--letterbox" in words[: words.index("&&")]
    search.model = ql.load_model("scenes-detr")
    assert "--letterbox" not in search._command("minmax", "W8A8", None)


def test_a_shipped_model_needs_no_weights_in_its_command(found) -> None:
    assert "--weights" not in found.smallest.command


# --- detectors ---


@pytest.fixture(scope="module")
def of_detector():
    pytest.importorskip("faster_coco_eval", reason="mAP needs faster-coco-eval")
    given = {"calibration": pictures(seed=9).values, "target": None, "methods": ["minmax"], "max_loss": 0.03}
    return ql.recommend(detector(), pictures(60), ood={"empty": pictures(30, seed=3, objects=False)}, **given)


@pytest.mark.slow
def test_a_detector_is_judged_by_map_on_images_with_boxes(of_detector) -> None:
    found, model, ids = of_detector, detector(), pictures(60)
    assert (found.metric, found.n, found.top1) == ("map", 60, None)
    assert found.fp32 == ql.evaluate(model, ids).id["map"]
    small, hopeless = found.smallest, [trial for trial in found.trials if trial.change < -0.3]
    made = ql.quantize(model, pictures(seed=9).values, "minmax", small.bits)
    change = ql.evaluate(made, ids, {"empty": pictures(30, seed=3, objects=False)}, scores=["max_confidence"]).change
    assert small.change == change["id"]["map"] >= -0.03
    assert small.others == {name: change["id"][name] for name in ("map50", "d_ece")}
    assert small.ood["empty"] == change["ood"]["empty"]["max_confidence"]["aupr_out"]
    assert small.low < small.change < small.high
    assert {(trial.inside, trial.n) for trial in hopeless} == {(False, 15)}
    told = found.to_dict()
    assert (told["map"], told["metric"], told["smallest"]["d_ece"]) == (found.fp32, "map", small.others["d_ece"])
    json.dumps(told, allow_nan=False)


def test_the_table_of_a_detector_names_its_metrics(of_detector, capsys) -> None:
    _common.show(_parts(of_detector), {}, None, "the recommendation")
    text = capsys.readouterr().out
    assert f"mAP {100 * of_detector.fp32:.2f} at FP32 on 60 images" in text
    assert "mAP@.5" in text
    assert "D-ECE" in text
    assert "top-1" not in text
    assert f"smallest: minmax {of_detector.smallest.bits}" in text


def test_images_without_boxes_and_models_that_are_neither_are_refused_in_a_sentence() -> None:
    images = pictures(seed=9).values
    with pytest.raises(QuantlensError, match="has no boxes, and the metrics of task 'detect' need them"):
        ql.recommend(detector(), pictures(40).values, calibration=images, target=None, methods=["minmax"])
    features = ql.load_model("digits-vit", task="features")
    with pytest.raises(QuantlensError, match="chooses by top-1 or mAP"):
        ql.recommend(features, ID, calibration=CALIBRATION, target=None, methods=["minmax"])


def test_a_detector_that_finds_nothing_is_told_of() -> None:
    pytest.importorskip("faster_coco_eval", reason="mAP needs faster-coco-eval")
    blind = detector(box_bias=1.0)
    found = ql.recommend(blind, pictures(30), calibration=pictures(seed=9).values, target=None, methods=["minmax"])
    assert found.fp32 == 0
    assert any("no more than may be lost, so that every setting is inside" in note for note in found.notes)


# --- what is refused ---


@pytest.mark.slow
def test_a_setting_that_is_refused_is_noted_and_the_search_goes_on(monkeypatch) -> None:
    from quantlens.studies import recommend as module

    def stubborn(model, calibration, method, bits, *rest, **more):
        if method == "minmax":
            raise UnsupportedError(f"minmax does not like {bits}")
        return ql.quantize(model, calibration, method, bits, *rest, **more)

    monkeypatch.setattr(module, "quantize", stubborn)
    given = {"calibration": CALIBRATION, "target": None, "max_loss": 0.05}
    found = ql.recommend("digits-vit", f"{ID}[:40]", methods=["minmax", "percentile"], **given)
    assert found.smallest.method == "percentile"
    assert "minmax W8A8 was left out: minmax does not like W8A8" in found.notes
    with pytest.raises(UnsupportedError, match="does not like W8A8"):
        ql.recommend("digits-vit", f"{ID}[:40]", methods=["minmax"], **given)
