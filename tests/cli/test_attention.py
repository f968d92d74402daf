"""`quantlens attention`: what it writes and prints, for names, checkpoints, every kind of map, and mistakes."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import quantlens as ql
from quantlens.cli import main

CALIBRATION = ("--calibration", "embedded:digits-calibration", "--n", "8", "--method", "minmax")
IMAGES = ("--images", "embedded:digits-test[0:20]")


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main.run(["attention", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_pictures_figures_and_a_table(run, tmp_path):
    code, out, err = run(
        "digits-vit", *IMAGES, "--ood", "letters=embedded:letters[0:9]", *CALIBRATION, "--bits", "W8A8,W4A4,W3A3",
        "--limit", "8", "--show", "2", "--choose", "most-changed", "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0, err
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "drift.json",
        "drift.svg",
        "maps.npz",
        "maps.png",
        "norms.png",
    ]
    figures = json.loads((tmp_path / "drift.json").read_text())
    assert figures["method"] == "minmax"
    assert list(figures["drift"]) == ["W8A8", "W4A4", "W3A3"]
    for name in ("ID", "letters"):
        found = [figures["drift"][bits][name]["rollout_spearman"] for bits in ("W8A8", "W4A4", "W3A3")]
        assert found == sorted(found, reverse=True)
        assert f"{found[1]:.3f}" in out
        summary = figures["drift"]["W4A4"][name]
        assert summary["n"] == 8
        assert len(summary["heads"]["row_kl"]) == len(summary["blocks"]["row_kl"]) == 6
    assert figures["images"]["letters"]["n"] == 8
    assert len(figures["images"]["ID"]["shown"]) == 2
    shown = np.asarray(Image.open(tmp_path / "maps.png").convert("RGB"))
    assert shown.shape[0] > 4 * 160
    assert shown.shape[1] > 5 * 160
    drawing = ElementTree.parse(tmp_path / "drift.svg").getroot()
    assert len(drawing.findall(".//{*}path[@aria-roledescription='point']")) >= 6 * 6
    assert "W3A3" in "".join(drawing.itertext())
    assert "top-10 %" in out
    with np.load(tmp_path / "maps.npz") as kept:
        assert kept["letters/W3A3/maps"].shape[0] == 8


@pytest.mark.slow
def test_checkpoints_and_gradient_maps(run, tmp_path):
    model = ql.load_model("digits-vit", "pretrained")
    path = tmp_path / "q.safetensors"
    ql.quantize(model, "embedded:digits-calibration?n=8&seed=0", method="minmax", bits="W4A4").save(path)
    out = tmp_path / "looks"
    code, text, err = run(
        str(path), "--weights", "pretrained", *IMAGES, "--map", "grad-cam", "--target", "3",
        "--limit", "4", "--show", "1", "--out", str(out),
    )  # fmt: skip
    assert code == 0, err
    figures = json.loads((out / "drift.json").read_text())
    assert list(figures["drift"]) == ["W4A4"]
    assert -1 <= figures["drift"]["W4A4"]["ID"]["map_spearman"] < 1
    assert figures["drift"]["W4A4"]["ID"]["row_kl"] > 0, "what needs no gradients is there too"
    assert figures["map"]["target"] == 3
    assert "W4A4" in text
    assert run(str(path), *IMAGES, "--out", str(out))[0] == 2


def test_names_are_shown_as_they_are_written(run, tmp_path):
    """A set's name is text, never markup or an emoji."""
    code, out, err = run(
        "digits-vit", *IMAGES, "--ood", "far [/x] :b: [bold]=embedded:letters[0:4]", *CALIBRATION, "--bits", "W8A8",
        "--limit", "2", "--show", "1", "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0, err
    assert "Drift from FP32 on far [/x] :b: [bold], 2 images" in out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--calibration", "embedded:digits-calibration", "--map", "cam"), "grad-cam"),
        (("--calibration", "embedded:digits-calibration", "--choose", "best"), "most-changed"),
        (("--calibration", "embedded:digits-calibration", "--ood", "letters"), "NAME=SOURCE"),
        (("--calibration", "embedded:digits-calibration", "--bits", "W0A4"), "0 bits"),
        (("--calibration", "embedded:digits-calibration", "--ood", "ID=embedded:letters"), "in-distribution"),
        (("--calibration", "embedded:digits-calibration", "--discard", "1.5", "--bits", "W8A8", "--n", "2",
          "--method", "minmax", "--limit", "2"), "discard"),
        ((), "--calibration"),
    ],
)  # fmt: skip
def test_mistakes_take_one_line(run, tmp_path, extra, message):
    code, out, err = run("digits-vit", *IMAGES, "--out", str(tmp_path / "o"), *extra)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    assert not Path(tmp_path / "o").exists()
