"""A store as one flat table: a row per finished cell, a column per figure, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantlens.errors import QuantlensError

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
        row |= {key: value for key, value in _numbers(cell.result, "") if key not in row}
        found.append(row)
    return found


def _numbers(value: Any, path: str) -> Iterable[tuple[str, float | int]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key not in LEFT_OUT and key not in ("fp32", "environment", "preprocess", "options", "allocation"):
                yield from _numbers(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def to_csv(cells: Iterable[Any]) -> str:
    """The table as CSV text; figures that a cell does not have are empty. Raises QuantlensError without cells."""
    table = rows(cells)
    if not table:
        raise QuantlensError("no cell is finished yet, so there is nothing to write; run `quantlens study` first")
    columns = list(dict.fromkeys(key for row in table for key in (*FIRST, *sorted(set(row) - set(FIRST)))))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def write_csv(directory: str | Path, target: str | Path) -> Path:
    """Write the table of the store in ``directory`` to ``target``, whole or not at all. Returns the path."""
    from quantlens.files import write_whole
    from quantlens.studies.store import Store

    target = Path(target)
    write_whole(target, to_csv(Store(directory).cells()).encode())
    return target
