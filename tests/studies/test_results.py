"""The results of a study as rows, files, data frames and means over seeds."""

from __future__ import annotations

import csv
import io
import statistics
import sys
from types import SimpleNamespace

import pytest

from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.studies.results import Results


def _cell(bits, seed, top1, status="done", **more):
    spec = {"model": "m, with comma", "method": "minmax", "bits": bits, "seed": seed, "options": {"p": 0.5}}
    result = {"bits": bits, "seed": seed, "id": {"top1": top1, "per_class": [{"top1": 1}]}, "flag": True, **more}
    return SimpleNamespace(spec=spec, status=status, result=result if status == "done" else None)


def test_every_number_under_its_path():
    cells = [
        _cell("W8A8", 0, 0.75, ood={"textures": {"n": 3, "msp": {"auroc": 0.5}}}),
        _cell("W4A4", 1, 0.5, fp32={"id": {"top1": 0.75}}, delta={"id": {"top1": 0.25}}),
        _cell("W4A4", 2, None, status="failed"),
    ]
    table = Results(cells).rows()
    assert len(table) == 2, "failed cells are left out"
    assert table[0]["id.top1"] == 0.75
    assert table[0]["ood.textures.msp.auroc"] == 0.5
    assert table[1]["change.id.top1"] == -0.25
    assert not any(key.startswith("delta") for key in table[1]), "it had the opposite sign, and is not read"
    assert not any("per_class" in key or key.startswith("fp32") or key == "flag" for key in table[0])
    read = list(csv.DictReader(io.StringIO(Results(cells).to_csv())))
    assert read[0]["model"] == "m, with comma"
    assert [float(r["id.top1"]) for r in read] == [0.75, 0.5]
    assert read[1]["ood.textures.n"] == ""
    assert read[0]["options"] == '{"p": 0.5}'


def test_an_empty_store_says_so():
    with pytest.raises(QuantlensError, match="quantlens study"):
        Results([]).to_csv()


def test_parquet_holds_the_same_table():
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = [_cell("W8A8", 0, 1, ood={"textures": {"n": 3}}), _cell("W4A4", 13, 0.5)]
    table = parquet.read_table(io.BytesIO(Results(cells).to_parquet()))
    assert table.to_pylist() == [{"ood.textures.n": None} | row for row in Results(cells).rows()]
    types = {field.name: str(field.type) for field in table.schema}
    assert (types["model"], types["seed"], types["id.top1"]) == ("string", "int64", "double")
    assert types["ood.textures.n"] == "int64"
    with pytest.raises(QuantlensError, match="quantlens study"):
        Results([]).to_parquet()


def test_parquet_without_pyarrow_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"quantlens\[parquet\].*--csv"):
        Results([_cell("W8A8", 0, 1.0)]).to_parquet()


def test_data_frames():
    pytest.importorskip("pandas")
    cells = [_cell("W8A8", 0, 1, ood={"textures": {"n": 3}}), _cell("W4A4", 13, 0.5), _cell("W4A4", 14, 0.5, "failed")]
    found = Results(cells)
    table = found.to_pandas()
    assert len(table) == len(found) == 2
    assert list(table.columns[:5]) == ["model", "method", "bits", "seed", "options"]
    assert table["id.top1"].tolist() == [1, 0.5]
    assert table["ood.textures.n"].isna().tolist() == [False, True]
    assert table.groupby("bits")["id.top1"].mean()["W4A4"] == 0.5
    with pytest.raises(QuantlensError, match="quantlens study"):
        Results([]).to_pandas()


def test_a_data_frame_without_pandas_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UnsupportedError, match=r"quantlens\[pandas\]"):
        Results([_cell("W8A8", 0, 1.0)]).to_pandas()


def test_means_over_seeds():
    part = {"msp": {"aupr_out": 0.5}, "energy": {"aupr_out": 0.25}}
    values = (0.25, 0.5, 0.9)
    cells = [_cell("FP32", 0, 1.0, size_mb=4.0), *(_cell("W4A4", i, v, size_mb=0.5) for i, v in enumerate(values))]
    for cell in cells:
        cell.result["ood_mean"] = {"far": part}
    fp32, low = Results(cells).means()
    assert (fp32.bits, fp32.seeds, low.bits, low.seeds) == ("FP32", [0], "W4A4", [0, 1, 2])
    top1 = low.metrics["id.top1"]
    assert (top1.mean, top1.std) == pytest.approx((statistics.mean(values), statistics.stdev(values)))
    assert fp32.metrics["id.top1"].std is None
    assert low.metrics["ood_mean.far.msp.aupr_out"].mean == 0.5
    assert low.metrics["id.nll"] is None
    for cell in cells:
        cell.result["ood_mean"] = {"far": {"energy": part["energy"]}}
    assert Results(cells).means()[1].metrics["ood_mean.far.energy.aupr_out"].mean == 0.25
    assert set(Results(cells).means(["id.top1"])[0].metrics) == {"id.top1"}
