"""`--calibration none`."""

from __future__ import annotations

from pathlib import Path

import pytest

import quantlens as ql


@pytest.mark.slow
def test_quantize_says_what_was_made(run, tmp_path: Path) -> None:
    file = tmp_path / "q.safetensors"
    words = ("quantize", "digits-vit", "--method", "minmax", "--seed", "2", "--out", str(file))
    code, _, err = run(*words, "--calibration", "none", "--n", "8")
    assert code == 0, err
    assert "no calibration images: 8 are made, made:dead-leaves?n=8&seed=2" in err
    assert ql.load(file).provenance.calibration["source"] == "made:dead-leaves?n=8&seed=2"
    code, _, err = run(*words, "--calibration", "made:noise", "--n", "8")
    assert code == 0, err
    assert "no calibration images" not in err


def test_help_and_errors_say_that_it_exists(run) -> None:
    assert "none: made ones" in " ".join(run("quantize", "--help")[1].replace("│", " ").split())
    code, _, err = run("attention", "digits-vit", "--images", "embedded:digits-test", "--out", "x")
    assert code == 2
    assert "or none: made ones" in err
    assert "made:NAME" in run("sources")[1]
