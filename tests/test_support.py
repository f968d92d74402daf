"""The table of what works with which architecture: how its marks follow from the numbers."""

import json

import pytest
from benchmarks.support import judge, page
from benchmarks.support.architectures import architectures

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
    assert f"- **{names[1]}**: ONNX: " in page(tmp_path, names)
