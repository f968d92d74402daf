"""`quantlens compare`, `evaluate --keep` and the exports of `report`, as a person calls them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

STUDY = """
models: [digits-vit]
methods: [minmax]
bits: [W4A4]
calibration: {source: "embedded:digits-calibration", n: 8}
id: embedded:digits-test[0:40]
ood: {letters: "embedded:letters[0:20]"}
scores: [msp, energy]
device: cpu
cache: false
outputs: scores
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from quantlens.cli import main

    folder = tmp_path_factory.mktemp("compare")
    (folder / "study.yaml").write_text(STUDY)
    assert main.run(["study", str(folder / "study.yaml"), "--out", str(folder / "out"), "-q"]) == 0
    return folder / "out"


def test_compare_a_study_with_fp32(run, study: Path, tmp_path: Path) -> None:
    code, out, _ = run(
        "compare", f"{study}:bits=FP32", f"{study}:bits=W4A4", "--resamples", "500", "--json", str(tmp_path / "c.json")
    )
    assert code == 0
    assert "B − A" in out
    assert "p (Holm)" in out
    assert "AUPR-out % ↑, letters, msp" in out
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["groups"][0]["title"]["bits"] == "FP32 → W4A4"
    top1 = next(f for f in found["groups"][0]["metrics"] if f["path"] == "id.top1")
    assert top1["difference"] == pytest.approx(top1["b"] - top1["a"])
    assert top1["low"] <= top1["difference"] <= top1["high"]


def test_compare_tells_the_operating_point_and_every_flip(run, study: Path, tmp_path: Path) -> None:
    sides = f"{study}:bits=FP32", f"{study}:bits=W4A4"
    flips = tmp_path / "flips.csv"
    code, out, _ = run("compare", *sides, "--resamples", "100", "--accuracy", "0.8", "--flips", str(flips))
    assert code == 0
    assert "a confidence cut that is right on at least 80 % of what it answers, OOD thresholds that keep" in out
    assert "thresholds of A on both" in out
    assert "thresholds set again on each" in out
    assert "thresholds: confidence" in out
    code, text, _ = run("compare", *sides, "--resamples", "100", "--coverage", "0.5", "--json", "-")
    assert code == 0
    group = json.loads(text)["groups"][0]
    rows = list(csv.DictReader(flips.read_text().splitlines()))
    listed = group["flips"][0]["images"]
    assert [row["image"] for row in rows] == [flip["image"] for flip in listed]
    assert len(listed) == sum(n for kind, n in group["flips"][0]["counts"].items() if kind != "n")
    assert all(flip["image"] in out.replace("\n", "") for flip in listed)
    coverage = next(f for f in group["operating"] if f["path"] == "operating.same.id.coverage")
    assert coverage["a"] >= 0.5
    assert sum(one["n"] for one in group["classes"]) == 40
    for wrong in (["--coverage", "2"], ["--coverage", "0.5", "--accuracy", "0.5"]):
        code, _, err = run("compare", *sides, *wrong)
        assert code == 2
        assert "coverage" in err


def test_compare_two_evaluations(run, tmp_path: Path) -> None:
    for name, images in (("a", "embedded:digits-test[0:30]"), ("b", "embedded:digits-test[30:60]")):
        code, out, err = run(
            *("evaluate", "digits-vit", "--id", images, "--scores", "msp", "-q", "--no-cache", "--device", "cpu"),
            *("--keep", str(tmp_path / f"{name}.npz"), "--json", str(tmp_path / f"{name}.json")),
        )
        assert code == 0, err
        assert f"{name}.npz" in out
    code, out, _ = run("compare", str(tmp_path / "a.npz"), str(tmp_path / "a.npz"), "--resamples", "200", "--json", "-")
    assert code == 0
    assert all(f["verdict"] == "not significant" for f in json.loads(out)["groups"][0]["metrics"])
    code, out, _ = run("compare", str(tmp_path / "a.json"), str(tmp_path / "a.json"))
    assert code == 0
    assert "no intervals" in out
    code, _, err = run("compare", str(tmp_path / "a.npz"), str(tmp_path / "b.npz"))
    assert code == 2
    assert "different ID images" in err
    (tmp_path / "other.json").write_text("[]")
    assert run("compare", str(tmp_path / "other.json"), str(tmp_path / "a.json"))[0] == 2
    code, _, err = run("compare", str(tmp_path / "none"), str(tmp_path / "a.json"))
    assert code == 2
    assert "no study in" in err


def test_exports(run, study: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    code, out, _ = run("report", str(study), "--csv", str(tmp_path / "t.csv"), "--parquet", str(tmp_path / "t.parquet"))
    assert code == 0
    assert out.count("table:") == 2
    assert (tmp_path / "t.parquet").read_bytes()[:4] == b"PAR1"
    assert not (study / "report.html").exists()
