"""quantize --target, export, evaluate, predict and bench, as a person runs them."""

from __future__ import annotations

import json

import pytest
from PIL import Image

pytest.importorskip("onnxruntime", reason="the deploy extra is not installed")


def test_from_quantize_to_predict(run, tmp_path):
    checkpoint, file, pictures = tmp_path / "d.safetensors", tmp_path / "d.onnx", []
    images = "embedded:digits-calibration?n=16&seed=0"
    quantize = ("quantize", "digits-vit", "--calibration", images, "--method", "minmax", "--no-cache")
    code, out, err = run(*quantize, "--bits", "W6A6", "--target", "openvino-cpu", "--out", str(checkpoint))
    assert (code, "8 or 4" in err) == (2, True), err
    assert run(*quantize, "--target", "openvino-cpu", "--out", str(checkpoint))[0] == 0
    code, out, err = run("export", str(checkpoint), "--out", str(file), "--guard-images", images, "--check", images)
    assert code == 0, err
    assert "unknown below" in out
    assert "equal predictions" in out
    code, out, err = run("evaluate", str(file), "--id", "embedded:digits-test?n=40&seed=0", "--json", "-", "--no-cache")
    assert code == 0, err
    assert json.loads(out)["bits"] == "W8A8"
    for i, shade in enumerate((0, 128)):
        pictures.append(tmp_path / f"{i}.png")
        Image.new("RGB", (50, 40), (shade, shade, 90)).save(pictures[-1])
    code, out, err = run("predict", str(file), *map(str, pictures), "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [set(f) for f in found] == [{"image", "label", "name", "probability", "score", "unknown"}] * 2
    code, out, err = run("predict", str(file), str(pictures[0]))
    assert (code, "known" in out) == (0, True)
    timings = tmp_path / "t.json"
    code, out, err = run("bench", str(file), "--rounds", "3", "--batch", "1,2", "--json", str(timings))
    assert code == 0, err
    assert [t["batch"] for t in json.loads(timings.read_text())] == [1, 2]


def test_mistakes_are_told_in_one_line(run, tmp_path):
    code, _, err = run("predict", str(tmp_path / "absent.onnx"), "a.png")
    assert (code, "no exported model" in err) == (2, True)
    code, _, err = run("export", "digits-vit", "--out", str(tmp_path / "m.pb"))
    assert (code, ".onnx or .xml" in err) == (2, True)
    code, _, err = run("bench", str(tmp_path / "absent.xml"))
    assert (code, "no exported model" in err) == (2, True)
