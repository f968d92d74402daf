"""How commands end where they cannot write: files are refused before anything is computed, consoles are put up with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

IMAGES = ("--calibration", "embedded:digits-calibration")
NOWHERE = "file/out.json"

WRITING = [
    ("quantize", "digits-vit", *IMAGES, "--out", NOWHERE),
    ("allocate", "digits-vit", *IMAGES, "--out", NOWHERE),
    ("inspect", "digits-vit", "--json", NOWHERE),
    ("inspect", "digits-vit", "--html", NOWHERE),
    ("export", "digits-vit", "--out", "file/out.onnx"),
    ("evaluate", "digits-vit", "--id", "embedded:digits-test", "--json", NOWHERE),
    ("evaluate", "digits-vit", "--id", "embedded:digits-test", "--keep", NOWHERE),
    ("evaluate", "digits.onnx", "--id", "embedded:digits-test", "--store", "file/store"),
    ("attention", "digits-vit", "--images", "embedded:digits-test", *IMAGES, "--out", "file/maps"),
    ("bench", "digits.onnx", "--json", NOWHERE),
    ("bench", "digits.onnx", "--store", "file/store"),
]


@pytest.mark.parametrize("arguments", WRITING, ids=lambda arguments: f"{arguments[0]} {arguments[-2]}")
def test_what_cannot_be_written_is_refused_before_anything_is_computed(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("quantlens.evaluation.open_models.load_model", refuse)
    monkeypatch.setattr("quantlens.models.load_model", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: cannot write ")
    assert "Not a directory" in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


SELDOM = (("models", "| head -0"), ("models", ">&- 2>&-"))
"""What a help ends like, and a table in another way of not being read."""


def piped(command: str, tail: str, **environment: str) -> subprocess.CompletedProcess[str]:
    text = f"{sys.executable} -m quantlens {command} {tail}; exit ${{PIPESTATUS[0]}}"
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    return subprocess.run(
        ["bash", "-c", text], capture_output=True, encoding=encoding, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    ("command", "tail"),
    [
        pytest.param(command, tail, marks=pytest.mark.slow if (command, tail) in SELDOM else ())
        for command in ("--help", "models")
        for tail in ("| head -1", "| head -0", ">&-", ">&- 2>&-")
    ],
)
def test_nobody_reads(command: str, tail: str) -> None:
    """Of a help or a table: exit code 0, and nothing on stderr."""
    done = piped(command, tail)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_result_that_goes_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = piped(f"evaluate digits-vit --id 'embedded:digits-test[0:8]' --no-cache --json {file}", ">&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert file.is_file()


@pytest.mark.parametrize(
    ("command", "encoding"),
    [
        pytest.param("methods", "ascii", marks=pytest.mark.slow),  # which takes seconds to import
        pytest.param("methods", "cp1252", marks=pytest.mark.slow),
        *(("sources", "ascii"), ("--help", "ascii"), ("study --help", "ascii"), ("--help", "cp1252")),
    ],
)
def test_what_an_encoding_cannot_say_is_replaced(command: str, encoding: str) -> None:
    done = piped(command, "", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("ünknown", "No such command '?"),
        pytest.param("methods ünknown", "unknown method '?", marks=pytest.mark.slow),
    ],
)
def test_mistakes_in_ascii(command: str, said: str) -> None:
    done = piped(command, "", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("predict", "x" * 300 + ".onnx", "a.png"), "x… is too long for the name of a file"),
        (("plot", "x" * 300), "x… is too long for the name of a file"),
        (("predict", "d.onnx", "a.png", "--threads", "999999999999"), "--threads"),
        (("quantize", "digits-vit", *IMAGES, "--seed", "9" * 24), "--seed"),
        (("evaluate", "hf:absent-dir/", "--id", "x"), "hf:"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_names_and_numbers_that_no_system_takes(run, tmp_path, monkeypatch, arguments, said) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
