"""`quantlens study` before and beside a run: `--plan`, and options that do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

STUDY = """
models: [digits-vit]
methods: [minmax]
bits: [W8A8]
calibration: {source: "embedded:digits-calibration", n: 16}
id: embedded:digits-test[0:32]
ood: {letters: "embedded:letters[0:16]"}
device: cpu
resources: {gpu: 0.5}
"""


@pytest.fixture
def study(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(STUDY)
    return str(path)


def test_the_plan_stores_nothing(run, study: str, tmp_path: Path) -> None:
    code, out, err = run("study", study, "--out", str(tmp_path / "out"), "--plan", "--workers", "2")
    assert code == 0
    lines = out.splitlines()
    assert lines[:3] == ["digits-vit FP32", "digits-vit minmax W8A8 seed 0", "2 cells"]
    assert "1 × FP32 " in lines[3]
    assert "1 × minmax " in lines[3]
    assert lines[4].endswith("with 2 workers like this machine's, scaled from cells of 32 images")
    assert lines[5].startswith("memory of each worker about")
    assert "pilot: digits-vit minmax W8A8 seed 0" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--executor", "rya"], "did you mean 'ray'"),
        (["--address", "auto"], "add --executor ray"),
        (["--gpus-per-worker", "0.5"], "add --executor ray"),
        (["--executor", "ray", "--gpus-per-worker", "2.5"], "a part of one GPU, or whole ones"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(run, study: str, tmp_path: Path, options: list[str], said: str) -> None:
    code, _, err = run("study", study, "--out", str(tmp_path / "out"), *options)
    assert code == 2
    assert said in " ".join(err.split())


def test_a_study_file_with_resources_that_cannot_be(run, study: str, tmp_path: Path) -> None:
    Path(study).write_text(STUDY.replace("0.5", "1.5"))
    code, _, err = run("study", study, "--out", str(tmp_path / "out"))
    assert code == 2
    assert "a worker has a part of one GPU, or whole ones" in " ".join(err.split())
