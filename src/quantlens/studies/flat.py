"""A store as one flat table: a row per finished cell, a column per figure, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from quantlens.errors import QuantlensError, UnsupportedError

FIRST = ("model", "method", "bits", "seed", "options")
LEFT_OUT = frozenset({"per_class", "reliability", "histograms", "attention_examples", "thumbnails", "edges"})
"""Parts of a result that are no single figures."""


def rows(cells: Iterable[Any]) -> list[dict[str, Any]]:
    """One dictionary per finished cell: what it is, then every number of its result under its path
    (``id.top1``, ``ood.textures.msp.aupr_out``, ``delta.id.top1`` …; fractions, as in ``to_dict()``)."""
    found = []
    for cell in cells:
        if cell.status != "done" or cell.result is None:
            continue
        row = {key: cell.spec.get(key) for key in FIRST[:4]}
        row["options"] = json.dumps(cell.spec.get("options") or {}, sort_keys=True)
        row |= {key: value for key, value in numbers(cell.result) if key not in row}
        found.append(row)
    return found


def numbers(value: Any, path: str = "") -> Iterable[tuple[str, float | int]]:
    """(path, number) of every figure in a result."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key not in LEFT_OUT and key not in ("fp32", "environment", "preprocess", "options", "allocation"):
                yield from numbers(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def to_csv(cells: Iterable[Any]) -> str:
    """The table as CSV text; figures that a cell does not have are empty. Raises QuantlensError without cells."""
    table, columns = _table(cells)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def to_parquet(cells: Iterable[Any]) -> bytes:
    """The table as a Parquet file (zstd): names as text, seeds and counts as int64, figures as float64; what a cell
    does not have is null. Raises QuantlensError without cells, UnsupportedError where pyarrow is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UnsupportedError(
            "writing Parquet needs pyarrow: run `pip install 'quantlens[parquet]'`, or write --csv instead"
        ) from error
    table, columns = _table(cells)
    arrays = {column: pyarrow.array(_one_type([row.get(column) for row in table])) for column in columns}
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table(arrays), sink, compression="zstd")
    return sink.getvalue()


def _table(cells: Iterable[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    table = rows(cells)
    if not table:
        raise QuantlensError("no cell is finished yet, so there is nothing to write; run `quantlens study` first")
    return table, list(dict.fromkeys(key for row in table for key in (*FIRST, *sorted(set(row) - set(FIRST)))))


def _one_type(values: list[Any]) -> list[Any]:
    """Numbers of a column as floats where one of them is."""
    if not any(isinstance(value, float) for value in values):
        return values
    return [None if value is None else float(value) for value in values]


def write_csv(directory: str | Path, target: str | Path) -> Path:
    """Write the table of the store in ``directory`` to ``target``, whole or not at all. Returns the path."""
    return _write(directory, target, to_csv)


def write_parquet(directory: str | Path, target: str | Path) -> Path:
    """As `write_csv`, in the format of `to_parquet`."""
    return _write(directory, target, to_parquet)


def _write(directory: str | Path, target: str | Path, form: Callable[[Iterable[Any]], str | bytes]) -> Path:
    from quantlens.files import write_whole
    from quantlens.studies.store import Store

    target = Path(target)
    with Store(directory) as store:
        write_whole(target, form(store.cells()))
    return target
