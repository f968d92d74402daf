"""Deltas that do not stand, as the report marks them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from study_fakes import FakeBackend, config

from quantlens.evaluation import outputs as kept
from quantlens.report import write_report
from quantlens.studies import significance as standing
from quantlens.studies.compare import compare
from quantlens.studies.runner import run_study
from quantlens.studies.significance import RESAMPLES, Standing
from quantlens.studies.store import Store


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("standing") / "store"
    settings = config(methods=["minmax"], bits=["W8A8", "W2A2"], ood={"v1.0": "embedded:letters[0:40]"})
    run_study(settings, out, progress=False, backend=FakeBackend(out.parent / "log"))
    return out


@pytest.fixture
def store(study: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(study, tmp_path / "copy"))


def keys(store: Path, bits: str) -> list[str]:
    return [cell.key for cell in Store(store).cells() if cell.spec["bits"] == bits]


def test_the_marks_are_the_intervals_of_compare(store: Path) -> None:
    asked = Standing(store)
    for bits in ("W8A8", "W2A2"):
        falls = asked.falls(keys(store, "FP32")[0], keys(store, bits))
        assert falls is not None
        (group,) = compare(f"{store}:bits=FP32", f"{store}:bits={bits}", scores=["all"], resamples=RESAMPLES).groups
        for figure in group.figures:
            if figure.path.rpartition(".")[2] in standing.ASKED:
                assert (figure.path in falls) == (figure.low <= 0 <= figure.high), figure
    assert asked.falls(keys(store, "FP32")[0], keys(store, "FP32")) >= {"id.top1", "ood_mean.all.msp.aupr_out"}


def test_answers_are_kept_and_a_damaged_file_of_them_is_no_harm(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Standing(store)
    base, cells = keys(store, "FP32")[0], keys(store, "W2A2")
    falls = first.falls(base, cells)
    first.save()
    (store / "outputs" / "standing.json").with_suffix(".copy").write_text("left by another program")
    with monkeypatch.context() as patched:
        patched.setattr(standing, "replicate", lambda *_: pytest.fail("measured again"))
        assert Standing(store).falls(base, cells) == falls
    first.file.write_text('{"half')
    assert Standing(store).falls(base, cells) == falls


def test_the_report_shows_the_sign_and_says_what_it_means(store: Path) -> None:
    page = write_report(store).read_text()
    assert "○ does not stand" in page
    row = next(r for r in re.findall(r"<tr data-row.*?</tr>", page, re.S) if "W8A8" in r)
    top1 = re.findall(r"<td[^>]*>([^<]*)", row)[4]
    expected = Standing(store).falls(keys(store, "FP32")[0], keys(store, "W8A8"))
    assert top1.endswith("○") == ("id.top1" in expected)
    assert "id.top1" in expected
    assert (store / "outputs" / "standing.json").is_file()
    assert json.loads((store / "outputs" / "standing.json").read_text())


def test_cells_whose_outputs_are_gone_have_no_marks_and_the_report_says_so(store: Path) -> None:
    lost, damaged = keys(store, "W8A8")[0], keys(store, "W2A2")[0]
    kept.path_of(store, lost).unlink()
    page = write_report(store).read_text()
    assert "1 row has no marks" in page
    kept.path_of(store, damaged).write_bytes(b"")
    (store / "outputs" / "standing.json").unlink()
    page = write_report(store).read_text()
    assert "No delta is marked" in page
    assert "○" not in page
