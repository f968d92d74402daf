"""`quantlens plot`: figures of a study as files."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_fakes import make_cells

from quantlens.studies.store import Store


@pytest.fixture
def study(tmp_path) -> Path:
    with Store(tmp_path) as store:
        for cell in make_cells(
            ("digits-vit",), ("minmax",), ("FP32", "W8A8", "W4A4"), (0, 1), scores=("msp", "energy")
        ):
            store.put(cell.key, cell.spec, "done", cell.result)
    return tmp_path


def test_figures_are_listed_and_written(run, study):
    code, out, err = run("plot", str(study), "--list")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == [
        "aupr",
        "sensitivity",
        "changes",
        "histograms",
        "reliability",
    ]
    code, out, err = run("plot", str(study), "--figure", "aupr", "--format", "pdf")
    assert (code, out, err) == (0, f"figure: {study / 'aupr.pdf'}\n", "")
    assert (study / "aupr.pdf").read_bytes().startswith(b"%PDF-")
    target = study / "deep" / "changes.svg"
    code, out, err = run(
        "plot", str(study), "--figure", "changes", "--bits", "W8A8", "--score", "energy", "--out", str(target)
    )
    assert (code, err) == (0, "")
    assert "minmax" in target.read_text(encoding="utf-8")


def test_mistakes_are_told_in_one_line(run, study, tmp_path_factory):
    nothing = tmp_path_factory.mktemp("empty")
    for arguments, words in (
        (("--figure", "nothing"), "unknown figure 'nothing'; choose one of aupr, changes, "),
        (("--figure", "widths"), "this study holds no data for the figure 'widths'"),
        (("--format", "gif"), "unknown format of a figure 'gif'; choose one of pdf, png, svg"),
        (("--score", "knn"), "unknown score of this study 'knn'; choose one of energy, msp"),
    ):
        code, out, err = run("plot", str(study), *arguments)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {words}")
        assert err.count("\n") == 1
    code, _, err = run("plot", str(nothing))
    assert code == 2
    assert "holds no store.sqlite" in err
