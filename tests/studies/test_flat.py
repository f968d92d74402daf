from __future__ import annotations

import csv
import io
import sys
from types import SimpleNamespace

import pytest

from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.studies.flat import rows, to_csv, to_parquet


def _cell(bits, seed, top1, status="done", **more):
    spec = {"model": "m, with comma", "method": "minmax", "bits": bits, "seed": seed, "options": {"p": 0.5}}
    result = {"bits": bits, "seed": seed, "id": {"top1": top1, "per_class": [{"top1": 1}]}, "flag": True, **more}
    return SimpleNamespace(spec=spec, status=status, result=result if status == "done" else None)


def test_every_number_under_its_path():
    cells = [
        _cell("W8A8", 0, 0.75, ood={"textures": {"n": 3, "msp": {"auroc": 0.5}}}),
        _cell("W4A4", 1, 0.5, fp32={"id": {"top1": 1.0}}),
        _cell("W4A4", 2, None, status="failed"),
    ]
    table = rows(cells)
    assert len(table) == 2, "failed cells are left out"
    assert table[0]["id.top1"] == 0.75
    assert table[0]["ood.textures.msp.auroc"] == 0.5
    assert not any("per_class" in key or key.startswith("fp32") or key == "flag" for key in table[0])
    read = list(csv.DictReader(io.StringIO(to_csv(cells))))
    assert read[0]["model"] == "m, with comma"
    assert [float(r["id.top1"]) for r in read] == [0.75, 0.5]
    assert read[1]["ood.textures.n"] == ""
    assert read[0]["options"] == '{"p": 0.5}'


def test_an_empty_store_says_so():
    with pytest.raises(QuantlensError, match="quantlens study"):
        to_csv([])


def test_parquet_holds_the_same_table():
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = [_cell("W8A8", 0, 1, ood={"textures": {"n": 3}}), _cell("W4A4", 13, 0.5)]
    table = parquet.read_table(io.BytesIO(to_parquet(cells)))
    assert table.to_pylist() == [{"ood.textures.n": None} | row for row in rows(cells)]
    types = {field.name: str(field.type) for field in table.schema}
    assert (types["model"], types["seed"], types["id.top1"]) == ("string", "int64", "double")
    assert types["ood.textures.n"] == "int64"
    with pytest.raises(QuantlensError, match="quantlens study"):
        to_parquet([])


def test_parquet_without_pyarrow_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"quantlens\[parquet\].*--csv"):
        to_parquet([_cell("W8A8", 0, 1.0)])
