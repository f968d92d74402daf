"""The quality cases: bounds and medians, and a mechanism test for every case. And the processors' table."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

pytest.importorskip("benchmarks.quality", reason="run as `python -m pytest` from the repository")

from benchmarks import processors
from benchmarks.quality import __main__ as quality
from benchmarks.quality.case import Case, NotHere

ROOT = Path(__file__).resolve().parents[1]


def test_a_median_keeps_a_bound():
    below = Case("a", "w", lambda seed: float(seed), below=2.5)
    assert below.measure() == [0, 1, 2, 3, 4]
    assert below.kept([9, 0, 2, 9, 1])
    assert not below.kept([9, 0, 3, 9, 1])
    assert not below.kept([float("nan")] * 5)
    assert not Case("a", "w", lambda seed: 0.0, above=0).kept([0.0] * 5)
    for wrong in ({}, {"below": 1, "above": 0}):
        with pytest.raises(ValueError, match="one bound"):
            Case("a", "w", lambda seed: 0.0, **wrong)


def test_a_line_says_measured_and_wanted(capsys, monkeypatch):
    def absent(seed):
        raise NotHere("no such thing")

    cases = (
        Case("good/one", "what", lambda seed: seed, below=3),
        Case("bad/one", "what", lambda seed: seed, above=3),
        Case("good/absent", "what", absent, above=3),
    )
    monkeypatch.setattr(quality, "CASES", cases)
    monkeypatch.setattr("sys.argv", ["quality", "good"])
    assert quality.main() == 0
    out = capsys.readouterr().out
    assert re.search(r"good/one +2 +wanted < 3 +ok", out)
    assert "skipped: no such thing" in out
    monkeypatch.setattr("sys.argv", ["quality"])
    assert quality.main() == 1
    assert re.search(r"bad/one +2 +wanted > 3 +MISS", capsys.readouterr().out)
    monkeypatch.setattr("sys.argv", ["quality", "odd"])
    with pytest.raises(SystemExit, match=r"'odd'.*bad, good"):
        quality.main()


def test_every_case_has_a_mechanism_test():
    """As the README beside the cases lists them."""
    names = [case.name for case in quality.CASES]
    assert len(names) == len(set(names))
    text = (ROOT / "benchmarks" / "quality" / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    patterns = [p.replace("…", "*") for cases, _ in rows for p in re.findall(r"`([^`]+)`", cases)]
    assert [name for name in names if not any(fnmatch(name, p) for p in patterns)] == []
    assert [p for p in patterns if not any(fnmatch(name, p) for name in names)] == []
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = [name for _, where in rows for name in re.findall(r"\b(test_\w+)(?!\.py)\b", where)]
    assert [
        name for name in named if f"def {name}(" not in tests and not any((ROOT / "tests").rglob(f"{name}.py"))
    ] == []
    assert all(re.search(r"\btest_", where) for _, where in rows)


def test_a_finished_log_is_read(tmp_path):
    log = tmp_path / "avx2-1.log"
    log.write_text("2 failed, 10 passed, 3 skipped, 1 error in 12.34s (0:00:12)\n")
    assert processors.read(log) is None
    log.write_text(log.read_text() + "# finished with 1 after 15.0 s\n")
    found = processors.read(log)
    assert found == processors.Outcome({"failed": 2, "passed": 10, "skipped": 3, "error": 1}, 1, 15.0)
    assert not found.green
    assert found.line("avx2-1").split() == ["avx2-1", "10", "2", "1", "3", "15", "RED"]


def test_a_setting_replaces_what_was_set(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512")
    assert "ATEN_CPU_CAPABILITY" not in processors.Setting("own", 2).environment()
    lower = processors.Setting("avx2", 2).environment()
    assert lower["ATEN_CPU_CAPABILITY"] == "avx2"
    assert lower["ONEDNN_MAX_CPU_ISA"] == lower["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
    assert lower["QUANTLENS_TEST_THREADS"] == "2"
