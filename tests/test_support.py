"""The table of what works with which architecture: how its marks follow from the numbers."""

import json

import pytest
import torch
from benchmarks.support import judge, page
from benchmarks.support.architectures import architectures
from benchmarks.support.worker import SAME, rounding, weakest
from torch import nn

import quantlens as ql
from quantlens.data import Preprocess

GOOD = {
    "capture": {"ok": True, "apart": 1e-7},
    "minmax W8A8": {"ok": True, "db": 30.0, "blocks": {"blocks.0": 40.0}},
    "quantlens-fast W8A8": {"ok": True, "db": 29.0, "blocks": {"blocks.0": 41.0}},
    "quantlens-fast W4A4": {"ok": True, "db": 12.0},
    "reload quantlens-fast W8A8": {"ok": True},
    "export any .onnx": {"ok": True, "db": 50.0},
    "export any .xml": {"ok": True, "db": 40.0},
    "export openvino-cpu .xml": {"ok": True, "db": 45.0},
}


def test_all_is_well():
    assert {mark for mark, _ in judge({"steps": GOOD}).values()} == {"●"}


@pytest.mark.parametrize(
    ("steps", "step", "mark", "said"),
    [
        ({"capture": {"ok": False, "apart": 0.01}}, "capture", "○", "1.0e-02 of the output's scale apart"),
        ({"minmax W8A8": {"ok": True, "db": 33.0, "blocks": {}}}, "W8A8", "◐", "4.0 dB below minmax (29.0)"),
        ({"minmax W8A8": {**GOOD["minmax W8A8"], "blocks": {"blocks.0": 45.0}}}, "W8A8", "◐", "at blocks.0"),
        ({"export any .xml": {"ok": False, "db": 12.0}}, "OpenVINO", "◐", "12.0 dB"),
        (
            {"export any .xml": {"ok": False, "db": 28.0, "rounding": 27.0, "weakest": 66.0, "edge": "a.input"}},
            "OpenVINO",
            "◐",
            "28.0 dB; within the rounding of codes: two simulations differ as much (27.0 dB; every quantizer of the "
            "file by itself: 66 dB or more)",
        ),
        (
            {"export any .xml": {"ok": False, "db": 23.0, "rounding": 27.0, "weakest": 66.0, "edge": "a.input"}},
            "OpenVINO",
            "◐",
            "23.0 dB; 4.0 dB beyond the rounding of codes: two simulations differ less (27.0 dB; every quantizer of "
            "the file by itself: 66 dB or more)",
        ),
        (
            {"export any .xml": {"ok": False, "db": 31.0, "weakest": 12.0, "edge": "a.input"}},
            "OpenVINO",
            "◐",
            "31.0 dB; a fault at a.input, by itself 12.0 dB",
        ),
        ({"export any .onnx": {"error": "UnsupportedError: no operator"}}, "ONNX", "○", "no operator"),
        ({"reload quantlens-fast W8A8": {"ok": False}}, "reload", "○", "not bit-equal"),
    ],
)
def test_what_is_not_well_is_said(steps, step, mark, said):
    found = judge({"steps": {**GOOD, **steps}})
    assert found[step][0] == mark
    assert said in found[step][1]
    assert {m for name, (m, _) in found.items() if name != step} == {"●"}


def test_a_process_that_ended_early_says_why():
    found = judge({"steps": {"capture": GOOD["capture"]}, "ended": "stopped after 600 s"})
    assert found["capture"][0] == "●"
    assert found["W8A8"] == ("○", "stopped after 600 s")


def test_architectures_are_many_and_the_page_shows_those_with_results(tmp_path):
    names = list(architectures())
    assert len(names) >= 200
    assert sum(name.startswith("hf-") for name in names) >= 25
    (tmp_path / f"{names[0]}.json").write_text(json.dumps({"steps": GOOD}))
    text = page(tmp_path, names)
    assert f"| {names[0]} | ● | ● | ● | ● | ● | ● |\n" in text
    assert names[1] not in text
    assert "What is not" not in text
    (tmp_path / f"{names[1]}.json").write_text(
        json.dumps({"steps": {**GOOD, "export any .onnx": {"error": "UnsupportedError: no operator"}}})
    )
    text = page(tmp_path, names)
    assert f"- **{names[1]}**: ONNX: " in text
    assert page(tmp_path / "nothing new", names, text) == text
    assert {"scenes-detr", "hf-yolos", "hf-d-fine"} <= set(names)


def test_a_fault_of_a_file_is_told_from_rounding(tmp_path):
    pytest.importorskip("openvino", reason="the deploy extra is not installed")
    torch.manual_seed(0)
    images = torch.randn(12, 3, 16, 16)
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 8, 2, 2), nn.Flatten(), nn.Linear(32, 5))
    preprocess = Preprocess((3, 16, 16))
    quantized = ql.quantize(ql.load_model(model.eval(), preprocess=preprocess), images, method="minmax", bits="W8A8")
    path = ql.export(quantized, tmp_path / "m.xml", simulate=True)
    assert weakest(quantized, path, images)[1] > SAME
    assert rounding(quantized, images) > SAME
    quantized.plan.quantizers["2.input"].scale.mul_(1.1)
    edge, db = weakest(quantized, path, images)
    assert edge == "2.input"
    assert db < 25
