"""`recommend`: what it answers is inside the budget, comes from what it tried, and can be made again."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest

import quantlens as ql
from quantlens.cli.main import run
from quantlens.cli.recommend import read_loss
from quantlens.errors import QuantlensError, UnknownNameError

ID, CALIBRATION = "embedded:digits-test", "embedded:digits-calibration"


@pytest.fixture(scope="module")
def found():
    return ql.recommend("digits-vit", ID, calibration=CALIBRATION, target=None, methods=["minmax", "repq-vit"])


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


def test_without_calibration_images_some_of_the_id_set_are_set_aside() -> None:
    found = ql.recommend("digits-vit", f"{ID}[:120]", target=None, methods=["minmax"], max_loss=0.5)
    assert found.n == 120 - 32
    assert "--n 32" in found.smallest.command


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


def test_too_few_images_and_images_of_the_calibration_are_refused() -> None:
    with pytest.raises(QuantlensError, match="fewer than 30"):
        ql.recommend("digits-vit", f"{ID}[:40]", target=None, methods=["minmax"])
    with pytest.raises(QuantlensError, match="draws a sample, of which none can be set aside"):
        ql.recommend("digits-vit", f"{ID}?n=200&seed=0", target=None, methods=["minmax"])
    with pytest.raises(QuantlensError, match="share"):
        ql.recommend("digits-vit", ID, calibration=ID, target=None, methods=["minmax"])
    with pytest.raises(QuantlensError, match="no method"):
        ql.recommend("digits-vit", ID, target=None, methods=[])


def test_an_interval_that_reaches_below_the_budget_is_told() -> None:
    found = ql.recommend("digits-vit", f"{ID}[:40]", calibration=CALIBRATION, target=None, methods=["minmax"])
    assert found.smallest.low < -found.max_loss
    assert any("more images" in note for note in found.notes)


def test_a_module_of_ones_own_gets_the_call_in_python() -> None:
    module = ql.load_model("digits-vit").module
    model = ql.load_model(module, preprocess=ql.load_model("digits-vit").preprocess)
    found = ql.recommend(model, f"{ID}[:40]", calibration=CALIBRATION, target=None, methods=["minmax"])
    assert found.smallest.command.startswith("ql.quantize(model, calibration, 'minmax', ")


def test_a_shipped_model_needs_no_weights_in_its_command(found) -> None:
    assert "--weights" not in found.smallest.command
