"""`quantlens study` and `demo` at their ends: stores that cannot be written, names with brackets, broken consoles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantlens.studies.backend import Backend

STUDY = {
    "name": "ablation [/no-rotation] :b: [bold]",
    "models": [{"name": "digits-vit", "label": "digits [red]"}],
    "methods": [{"name": "minmax", "label": "min[/]max"}],
    "bits": ["W8A8"],
    "calibration": {"source": "embedded:digits-calibration", "n": 8},
    "id": "embedded:digits-test[0:16]",
    "scores": ["msp"],
    "device": "cpu",
    "cache": False,
    "outputs": False,
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(STUDY))
    return path


def piped(study: Path, tail: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantlens", "study", str(study), "--out", str(study.parent / "out")]
    text = " ".join([*command, *options, tail])
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.slow
def test_names_are_shown_as_they_are_written(run, study: Path) -> None:
    """In the table, on every rerun, and where a cell fails; and the report is there."""
    arguments = ("study", str(study), "--out", str(study.parent / "out"), "--report")
    for _ in range(2):
        code, out, err = run(*arguments)
        assert (code, (study.parent / "out" / "report.html").is_file()) == (0, True)
        assert "ablation [/no-rotation] :b: [bold]: mean" in out
        assert "min[/]max" in out
    assert "2 cells" in err
    labels = [{"name": "digits-vit", "label": label} for label in ("d [/] :b:", "other")]
    study.write_text(json.dumps({**STUDY, "models": labels}))
    assert "d [/] :b:" in run(*arguments)[1]


@pytest.mark.process
@pytest.mark.parametrize("tail", ["| head -0", ""], ids=["no reader", "ascii"])
def test_the_report_does_not_wait_for_the_table(study: Path, tail: str) -> None:
    piped(study, tail, "--report", "--quiet", PYTHONIOENCODING="utf-8" if tail else "ascii")
    assert (study.parent / "out" / "report.html").is_file()


@pytest.mark.process
def test_a_limit_ends_without_a_word_of_other_libraries(study: Path) -> None:
    done = piped(study, "", "--limit", "1")
    assert done.returncode == 0
    assert "1 of 2 cells done (1 in this run)" in done.stdout
    assert [line for line in done.stderr.splitlines() if not line.startswith(("2 cells", "[1/2] "))] == []


@pytest.mark.parametrize("command", ["study", "demo"])
@pytest.mark.parametrize("place", ["file/out", "/proc/quantlens"])
def test_a_store_that_cannot_be_written_is_refused_at_once(
    run, study: Path, monkeypatch: pytest.MonkeyPatch, command: str, place: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(Backend, "load_model", refuse)
    (study.parent / "file").write_text("")
    out = str(study.parent / place)
    code, _, err = run(command, *([str(study)] if command == "study" else []), "--out", out, "--workers", "1")
    assert code == 2
    assert f"the store {out}/store.sqlite cannot be written" in err
    assert err.count("\n") == 1
