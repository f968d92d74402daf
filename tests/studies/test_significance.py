"""Changes that are not significant, as the report marks them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from study_fakes import FakeBackend, config

from quantlens.evaluation import outputs as kept
from quantlens.report import write_report
from quantlens.studies import significance
from quantlens.studies.compare import compare
from quantlens.studies.runner import run_study
from quantlens.studies.significance import RESAMPLES, Significance
from quantlens.studies.store import Store


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("significance") / "store"
    settings = config(methods=["minmax"], bits=["W8A8", "W2A2"], ood={"v1.0": "embedded:letters[0:40]"})
    run_study(settings, out, progress=False, backend=FakeBackend(out.parent / "log"))
    return out


@pytest.fixture
def store(study: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(study, tmp_path / "copy"))


def keys(store: Path, bits: str) -> list[str]:
    return [cell.key for cell in Store(store).cells() if cell.spec["bits"] == bits]


def test_the_marks_are_the_intervals_of_compare(store: Path) -> None:
    asked = Significance(store)
    for bits in ("W8A8", "W2A2"):
        found = asked.not_significant(keys(store, "FP32")[0], keys(store, bits))
        assert found is not None
        (group,) = compare(f"{store}:bits=FP32", f"{store}:bits={bits}", scores=["all"], resamples=RESAMPLES).groups
        for figure in group.metrics:
            if figure.path.rpartition(".")[2] in significance.asked_of("classify"):
                assert (figure.path in found) == (figure.low <= 0 <= figure.high), figure
    assert asked.not_significant(keys(store, "FP32")[0], keys(store, "FP32")) >= {
        "id.top1",
        "ood_mean.all.msp.aupr_out",
    }


def test_answers_are_kept_and_a_damaged_file_of_them_is_no_harm(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Significance(store)
    base, cells = keys(store, "FP32")[0], keys(store, "W2A2")
    found = first.not_significant(base, cells)
    first.save()
    (store / "outputs" / "significance.json").with_suffix(".copy").write_text("left by another program")
    with monkeypatch.context() as patched:
        patched.setattr(significance, "replicate", lambda *_: pytest.fail("measured again"))
        assert Significance(store).not_significant(base, cells) == found
    first.file.write_text('{"half')
    assert Significance(store).not_significant(base, cells) == found


def test_the_report_shows_the_sign_and_says_what_it_means(store: Path) -> None:
    page = write_report(store).read_text()
    assert "○ not significant" in page
    row = next(r for r in re.findall(r"<tr data-row.*?</tr>", page, re.S) if "W8A8" in r)
    top1 = re.findall(r"<td[^>]*>([^<]*)", row)[4]
    expected = Significance(store).not_significant(keys(store, "FP32")[0], keys(store, "W8A8"))
    assert top1.endswith("○") == ("id.top1" in expected)
    assert "id.top1" in expected
    assert (store / "outputs" / "significance.json").is_file()
    assert json.loads((store / "outputs" / "significance.json").read_text())


def test_cells_whose_outputs_are_gone_have_no_marks_and_the_report_says_so(store: Path) -> None:
    lost, damaged = keys(store, "W8A8")[0], keys(store, "W2A2")[0]
    kept.path_of(store, lost).unlink()
    page = write_report(store).read_text()
    assert "1 row has no marks" in page
    kept.path_of(store, damaged).write_bytes(b"")
    for answers in ("significance", "operating"):
        (store / "outputs" / f"{answers}.json").unlink()
    page = write_report(store).read_text()
    assert "No change is marked" in page
    assert "○" not in page
