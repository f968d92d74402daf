"""A store of an earlier release, whose differences were FP32 - quantized (kept/README.md): what is made of it today has
today's sign, and nothing of it is run or measured again."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import quantlens as ql
from quantlens.evaluation import Result
from quantlens.report import write_report
from quantlens.studies.store import Store

KEPT = Path(__file__).parent / "kept"
METHODS = ("minmax", "repq-vit")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A copy, as reading a store leaves files beside it."""
    return Path(shutil.copytree(KEPT, tmp_path / "store"))


@pytest.fixture
def results(store: Path) -> dict[str, dict]:
    """method -> stored result."""
    with Store(store) as opened:
        return {cell.spec["method"]: cell.result for cell in opened.cells()}


def lost(results: dict[str, dict], method: str, *path: str) -> float:
    """Quantized less FP32 of a stored metric, written out."""
    value, fp32 = results[method], results["fp32"]
    for key in path:
        value, fp32 = value[key], fp32[key]
    return value - fp32


@pytest.mark.parametrize("method", METHODS)
def test_its_results_have_todays_sign(results: dict[str, dict], method: str) -> None:
    stored = results[method]
    top1 = lost(results, method, "id", "top1")
    assert top1 < 0, "four bits cost accuracy"
    assert stored["delta"]["id"]["top1"] == pytest.approx(-top1), "an earlier release had it the other way round"
    result = Result.from_dict(stored)
    assert result.change["id"]["top1"] == pytest.approx(top1)
    again = result.to_dict()
    assert "delta" not in again
    assert again["change"]["ood_mean"]["far"]["msp"]["aupr_out"] == pytest.approx(
        lost(results, method, "ood_mean", "far", "msp", "aupr_out")
    )
    assert again["change"]["id"]["nll"] > 0


def test_its_report_has_todays_sign(store: Path, results: dict[str, dict]) -> None:
    page = write_report(store).read_text(encoding="utf-8")
    assert "Δ = quantized − FP32" in page
    assert not re.search(r"FP32 (less|−|minus) quantized", page), "one sign, in every caption"
    if "Top-1 per class" in page:
        assert "Δ is quantized − FP32" in page
    table = re.search(r'<table[^>]* id="delta-table">.*?</table>', page, re.S)[0]
    columns = re.findall(r'<th scope="col" data-sort="num"[^>]*>([^<]*)', table)
    assert columns == ["Seeds", "Δ top-1 ↑", "Δ NLL ↓", "Δ ECE ↓", "Δ AUPR-out ↑, far sets", "Δ AUPR-out ↑, near sets"]
    rows = [re.findall(r"<td[^>]*>([^<]*)", row) for row in re.findall(r"<tr data-row.*?</tr>", table, re.S)]
    assert [row[1] for row in rows] == ["minmax", "repq-vit"], "the largest loss of top-1 comes first"
    paths = [
        (("id", "top1"), 100),
        (("id", "nll"), 1),
        (("id", "ece"), 100),
        (("ood_mean", "far", "msp", "aupr_out"), 100),
        (("ood_mean", "near", "msp", "aupr_out"), 100),
    ]
    for row in rows:
        for text, (path, factor) in zip(row[4:], paths, strict=True):
            shown = float(text.removesuffix(" ○").replace("−", "-"))
            assert shown == pytest.approx(factor * lost(results, row[1], *path), abs=0.051 if factor > 1 else 0.00051)
    assert "largest loss of top-1 is 18.3 points" in page


def test_it_is_compared_with_its_intervals(store: Path, results: dict[str, dict]) -> None:
    found = ql.compare(f"{store}:bits=FP32", f"{store}:method=minmax", resamples=1000)
    top1 = next(one for one in found.groups[0].metrics if one.path == "id.top1")
    assert top1.difference == pytest.approx(lost(results, "minmax", "id", "top1"))
    assert top1.low < top1.difference < top1.high < 0
    assert top1.verdict == "significant"


def test_it_is_a_data_frame(store: Path, results: dict[str, dict]) -> None:
    pytest.importorskip("pandas")
    table = ql.results(store).to_pandas().set_index("method")
    assert list(table.index) == ["fp32", *METHODS]
    assert not [name for name in table.columns if name.startswith("delta")]
    for method in METHODS:
        assert table.loc[method, "change.id.top1"] == pytest.approx(lost(results, method, "id", "top1"))
    assert table["id.top1"].notna().all()
