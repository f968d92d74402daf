"""`quantlens allocate`, and mixed precision in `quantize`, `study` and `report`."""

from __future__ import annotations

import json
import re

import pytest

IMAGES = ("--calibration", "embedded:digits-calibration", "--n", "8")


def test_help_has_examples(run) -> None:
    code, out, err = run("allocate", "--help")
    assert (code, err) == (0, "")
    assert "Examples" in out
    assert "    quantlens allocate" in out


def test_from_allocation_to_checkpoint(run, tmp_path) -> None:
    file, checkpoint = tmp_path / "alloc.json", tmp_path / "q.safetensors"
    code, out, err = run("allocate", "digits-vit", *IMAGES, "--target", "W4A4", "--front", "--out", str(file))
    assert (code, err) == (0, "")
    data = json.loads(file.read_text())
    assert data["candidates"] == [2, 3, 4, 5, 6]
    assert data["total"] <= data["budget"]
    assert len(data["front"]) > 5
    for group in data["groups"]:
        assert re.search(rf"{re.escape(group['name'])} +{group['bits']} ", out)
    assert "MB" in out.splitlines()[-1]

    page = (tmp_path / "front.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.count('<div class="chart') == 2
    assert not re.search(r"src=|href=\"[^d]", page)
    assert all(group["name"] in page for group in data["groups"])

    code, out, err = run(
        "quantize", "digits-vit", *IMAGES, "--method", "minmax", "--bits", str(file), "--out", str(checkpoint)
    )
    assert (code, err) == (0, "")
    assert "minmax MP4" in out


@pytest.mark.slow
def test_budgets(run, tmp_path) -> None:
    file = str(tmp_path / "a.json")
    base = ("allocate", "digits-vit", *IMAGES, "--sensitivity", "random", "--out", file)
    code, _, err = run(*base, "--size-mb", "0.3", "--candidates", "4,6,8")
    assert (code, err) == (0, "")
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["budget"] == 300_000 >= data["total"]
    assert {g["bits"] for g in data["groups"]} <= {4, 6, 8}
    assert run(*base, "--bops", "5e8")[0] == 0
    assert json.loads((tmp_path / "a.json").read_text())["cost"] == "bops"
    for extra, words in (
        (("--size-mb", "0.01"), "least possible"),
        (("--size-mb", "1", "--bops", "1e9"), "give one of them"),
        (("--target", "W6A8"), "share a width"),
        (("--option", "probes=3"), "option of random"),
        (("--candidates", "4,x"), "whole numbers"),
    ):
        code, _, err = run(*base, *extra)
        assert code == 2, extra
        assert words in err
        assert err.count("\n") == 1
    code, _, err = run("allocate", "digits-vit", *IMAGES, "--sensitivity", "kll")
    assert code == 2
    assert "kl" in err


def test_another_model_s_allocation_is_refused(run, tmp_path) -> None:
    file = tmp_path / "a.json"
    assert run("allocate", "digits-vit", *IMAGES, "--sensitivity", "random", "--out", str(file))[0] == 0
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "checkpoint_sha256": "0" * 64, "model": "other"}))
    code, _, err = run("quantize", "digits-vit", *IMAGES, "--bits", str(file))
    assert code == 2
    assert "was made for other" in err
    assert "not for digits-vit" in err


@pytest.mark.slow
def test_a_study_with_mixed_precision(run, tmp_path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(
        "models: [digits-vit]\nmethods: [minmax]\nbits: [FP32, W4A4, mp4]\n"
        "calibration: {source: embedded:digits-calibration, n: 8}\nid: embedded:digits-test[0:60]\nscores: [msp]\n"
    )
    code, _, err = run("study", str(study), "--out", str(tmp_path / "out"))
    assert code == 0, err
    from quantlens.studies.store import Store

    cells = {cell.spec["bits"]: cell.result for cell in Store(tmp_path / "out").cells()}
    assert set(cells) == {"FP32", "W4A4", "MP4"}
    assert cells["MP4"]["size_mb"] <= cells["W4A4"]["size_mb"]
    widths = cells["MP4"]["allocation"]["groups"]
    assert len({group["bits"] for group in widths}) > 1
    assert "allocation" not in cells["W4A4"]
    code, _, err = run("report", str(tmp_path / "out"))
    assert code == 0, err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Mixed precision: the widths chosen" in page
    assert all(f'<td class="text">{g["name"]}</td><td>{g["bits"]}</td>' in page for g in widths)


def test_a_study_refuses_what_is_no_target(run, tmp_path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(
        "models: [digits-vit]\nmethods: [minmax]\nbits: [MP12]\ncalibration: embedded:digits\nid: embedded:x\n"
    )
    code, _, err = run("study", str(study), "--out", str(tmp_path / "out"))
    assert code == 2
    assert "2 to 10 bits" in err
