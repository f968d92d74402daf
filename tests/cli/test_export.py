"""quantize --target, export, evaluate, predict and bench, as a person runs them."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import quantlens as ql
from quantlens.export.exported import saturates

pytest.importorskip("onnxruntime", reason="the deploy extra is not installed")


@pytest.mark.slow
def test_from_quantize_to_predict(run, tmp_path):
    checkpoint, file, pictures = tmp_path / "d.safetensors", tmp_path / "d.onnx", []
    images = "embedded:digits-calibration?n=16&seed=0"
    quantize = ("quantize", "digits-vit", "--calibration", images, "--method", "minmax", "--no-cache")
    code, out, err = run(*quantize, "--bits", "W6A6", "--target", "openvino-cpu", "--out", str(checkpoint))
    assert (code, "6-bit activations" in err) == (2, True), err
    assert run(*quantize, "--target", "openvino-cpu", "--out", str(checkpoint))[0] == 0
    code, out, err = run("export", str(checkpoint), "--out", str(file), "--guard-images", images, "--check", images)
    assert code == 0, err
    assert "unknown below" in out
    assert "of 16 images (embedded:digits-calibration" in out
    assert "GEN" in out, "what the scores were compared by"
    assert "equal predictions" in out
    assert ("x64quantprecision" in out) == saturates()
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
    _bad_pictures(run, file, pictures, tmp_path)
    timings = tmp_path / "t.json"
    code, out, err = run("bench", str(file), "--rounds", "3", "--batch", "1,2", "--json", str(timings))
    assert code == 0, err
    assert [t["batch"] for t in json.loads(timings.read_text())] == [1, 2]


def _bad_pictures(run, file, pictures, tmp_path):
    """The bad ones are named, the others are predicted as without them."""
    alone = json.loads(run("predict", str(file), *map(str, pictures), "--json")[1])
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(pictures[0].read_bytes()[:60])
    given = [tmp_path / "text.png", pictures[0], tmp_path / "cut.png", tmp_path / "folder.png", pictures[1]]
    given.append(tmp_path / "absent.png")
    for size in ("16", "2"):
        code, out, err = run("predict", str(file), *map(str, given), "--json", "--batch-size", size)
        found = json.loads(out)
        good = [f for f in found if "error" not in f]
        assert (code, [f["label"] for f in good]) == (1, [f["label"] for f in alone])
        for key in ("probability", "score"):
            assert [f[key] for f in good] == pytest.approx([f[key] for f in alone], rel=1e-4)
        assert [f["image"] for f in found] == list(map(str, given))
        for bad, why in (("text", "not an image"), ("cut", "damaged"), ("folder", "directory"), ("absent", "no such")):
            assert any(bad in line and why in line for line in err.splitlines()), err
    code, out, _ = run("predict", str(file), str(given[0]))
    assert (code, "text.png" in out) == (1, False)


@pytest.mark.slow
def test_the_decision_page(run, tmp_path):
    """evaluate and bench with --store, then the report, joined by the file."""
    file, store = tmp_path / "d.onnx", str(tmp_path / "results")
    images = "embedded:digits-calibration?n=16&seed=0"
    code, _, err = run("export", "digits-vit", "--out", str(file), "--guard-images", images)
    assert code == 0, err
    sets = ("--id", "embedded:digits-test?n=40&seed=0", "--ood", "letters=embedded:letters?n=20&seed=0", "--no-cache")
    code, out, err = run("evaluate", str(file), *sets, "--scores", "msp", "--store", store)
    assert (code, "looks unknown" in out) == (0, True), err
    code, _, err = run("evaluate", "digits-vit", *sets, "--store", store)
    assert (code, "--store" in err) == (2, True)
    bench = ("bench", str(file), "--fp32", "digits-vit", "--rounds", "3", "--store", store)
    code, _, err = run(*bench, "--files", str(tmp_path / "kept"))
    assert code == 0, err
    assert (tmp_path / "kept" / "fp32.onnx").is_file()
    code, _, err = run("report", store)
    assert code == 0, err
    html = (tmp_path / "results" / "report.html").read_text(encoding="utf-8")
    section = html.split('<section id="decision">')[1].split("</section>")[0]
    assert "d.onnx" in section
    assert "on the front" in section
    assert "letters: balanced accuracy %" in section
    assert "not evaluated" in section, "the float model in OpenVINO was timed only"


def test_mistakes_are_told_in_one_line(run, tmp_path):
    code, _, err = run("predict", str(tmp_path / "absent.onnx"), "a.png")
    assert (code, "no exported model" in err) == (2, True)
    code, _, err = run("export", "digits-vit", "--out", str(tmp_path / "m.pb"))
    assert (code, ".onnx or .xml" in err) == (2, True)
    code, _, err = run("bench", str(tmp_path / "absent.xml"))
    assert (code, "no exported model" in err) == (2, True)


def test_a_file_is_verified(run, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the deploy extra is not installed")
    model = ql.load_model("digits-vit")
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
    qmodel = ql.quantize(model, images, method="minmax", bits="W8A8", target="openvino-cpu")
    checkpoint, file = str(qmodel.save(tmp_path / "d.safetensors")), str(ql.export(qmodel, tmp_path / "d.onnx"))
    code, out, err = run("verify", file, checkpoint)
    assert (code, err) == (0, "")
    assert "26 of 26 sites" in out
    proto = onnx.load(file)
    codes = next(one for one in proto.graph.initializer if one.name == "blocks.2.attn.proj.weight.codes")
    codes.raw_data = bytes([codes.raw_data[0] ^ 1]) + codes.raw_data[1:]
    onnx.save(proto, file)
    code, out, _ = run("verify", file, checkpoint)
    assert code == 1
    assert "first difference: blocks.2.attn.proj.weight: code [0, 0] is" in " ".join(out.split())
    code, out, _ = run("verify", file, checkpoint, "--json")
    assert (code, [one["site"] for one in json.loads(out)["different"]]) == (1, ["blocks.2.attn.proj"])
    code, _, err = run("predict", file, "a.png")
    assert (code, "does not match the digest" in err) == (2, True), "and such a file is not run"


@pytest.mark.slow
def test_a_file_that_nothing_runs_is_read_back(run, loaded, pictures, tmp_path):
    pytest.importorskip("onnx", minversion="1.19", reason="onnx has no NVFP4")
    qmodel = ql.quantize(loaded["vit"], pictures, method="minmax", bits="WNVFP4A8")
    checkpoint, file = str(qmodel.save(tmp_path / "q.safetensors")), str(tmp_path / "m.onnx")
    code, _, err = run("export", checkpoint, "--out", file)
    assert (code, "--opset 23" in err) == (2, True), err
    code, out, err = run("export", checkpoint, "--out", file, "--opset", "23")
    assert code == 0, err
    assert "float4e2m1 in" in out
    if "not run" in out:
        assert "not run: ONNX Runtime: " in out
        assert "16 of 16 sites that are quantized agree" in out, out
