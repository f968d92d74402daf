"""The results of a study as tables: a row per finished cell, or per model, method and precision over its seeds."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlens.arguments import checked
from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.evaluation.differences import Difference
from quantlens.evaluation.result import columns, frame, row
from quantlens.files import write_whole
from quantlens.metrics import Spread, first_score, summary_of
from quantlens.metrics.operating import Promise
from quantlens.studies.board import board_of, dig
from quantlens.studies.operating import WITHOUT, Row, operating
from quantlens.studies.store import Store

SHOWN = ("ood_mean.far.{score}.aupr_out", "ood_mean.near.{score}.aupr_out", "size_mb")
"""Paths of the metrics that a summary shows, after those of the task."""


@dataclass
class Mean:
    """One model, method and precision over its seeds; each metric by its path, None where no seed has it."""

    model: str
    method: str
    bits: str
    seeds: list[int] = field(default_factory=list)
    metrics: dict[str, Spread | None] = field(default_factory=dict)


class Results:
    """The finished cells of a study, in the order of the store. Failed cells are left out."""

    def __init__(self, cells: Iterable[Any], directory: Path | None = None):
        self.directory = directory
        self.cells = [cell for cell in cells if cell.status == "done" and cell.result is not None]

    def __len__(self) -> int:
        return len(self.cells)

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per cell: model, method, bits, seed and options, then every number of its result under its
        path ("id.top1", "ood.textures.msp.aupr_out", "change.id.top1" …; fractions, as in `to_dict()`)."""
        return [row(cell.spec, cell.result) for cell in self.cells]

    def means(self, paths: Sequence[str] | None = None) -> list[Mean]:
        """Mean and standard deviation over seeds. paths: of the metrics; None: those of a summary (`shown`)."""
        paths = self.shown() if paths is None else paths
        groups: dict[tuple[str, str, str], list[Any]] = {}
        for cell in self.cells:
            groups.setdefault((cell.spec["model"], cell.spec["method"], cell.spec["bits"]), []).append(cell)
        found = []
        for names, members in groups.items():
            spreads = {path: Spread.of(dig(cell.result, tuple(path.split("."))) for cell in members) for path in paths}
            found.append(Mean(*names, [int(cell.spec["seed"]) for cell in members], spreads))
        return found

    def shown(self) -> list[str]:
        """Paths of the metrics that a summary shows: OOD detection by the score that stands for all."""
        means = [part for cell in self.cells for part in (cell.result.get("ood_mean") or {}).values()]
        score = first_score(score for part in means for score in part)
        tasks = dict.fromkeys(cell.result.get("task") for cell in self.cells) or {None: None}
        ids = dict.fromkeys(f"id.{name}" for task in tasks for name in summary_of(task)[:2])
        return [*ids, *(path.format(score=score) for path in SHOWN)]

    def operating(
        self, *, coverage: float | None = None, accuracy: float | None = None, keep: float | None = None
    ) -> list[dict[str, Any]]:
        """What the thresholds of FP32 do at every precision, a row for each model, method, precision, thresholds
        ("same" as FP32's, or set "again"), image set, score and metric: fractions, means over seeds; `change` is
        quantized less FP32, from `low` to `high` its 95 % interval by a paired bootstrap (1000 resamples).

        The promises are those of `metrics.operating.Promise`; without any they are the study's. Raises QuantlensError
        where no per-image outputs are kept.
        """
        given = {"coverage": coverage, "accuracy": accuracy, "keep": keep}
        asked = {name: value for name, value in given.items() if value is not None}
        promise = Promise(**asked) if asked else None
        rows = [] if self.directory is None else operating(board_of(self.directory), promise).rows
        if not rows:
            raise QuantlensError(f"there is no operating point: {WITHOUT}")
        return [_operated(row, one) for row in rows for one in row.metrics.values()]

    def to_pandas(self) -> Any:
        """A pandas DataFrame of `rows`. Raises QuantlensError without cells, UnsupportedError without pandas."""
        return frame(self._rows())

    def to_csv(self) -> str:
        """The rows as CSV text; what a cell does not have is empty. Raises QuantlensError without cells."""
        text = io.StringIO()
        rows = self._rows()
        writer = csv.DictWriter(text, columns(rows), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_parquet(self) -> bytes:
        """The rows as a Parquet file (zstd): names as text, seeds and counts as int64, metrics as float64; what a cell
        does not have is null. Raises QuantlensError without cells, UnsupportedError where pyarrow is not installed."""
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise UnsupportedError(
                "writing Parquet needs pyarrow: run `pip install 'quantlens[parquet]'`, or write --csv instead"
            ) from error
        rows = self._rows()
        arrays = {}
        for name in columns(rows):
            values = [one.get(name) for one in rows]
            kind = pyarrow.float64() if any(isinstance(value, float) for value in values) else None
            arrays[name] = pyarrow.array(values, kind)
        sink = io.BytesIO()
        parquet.write_table(pyarrow.table(arrays), sink, compression="zstd")
        return sink.getvalue()

    def _rows(self) -> list[dict[str, Any]]:
        rows = self.rows()
        if not rows:
            raise QuantlensError("no cell is finished yet, so there is nothing to write; run `quantlens study` first")
        return rows


def _operated(row: Row, one: Difference) -> dict[str, Any]:
    _, how, part, *rest, metric = one.path.split(".")  # operating.same.ood.textures.msp.misses
    name, score = ".".join(rest[:-1]), rest[-1] if rest else ""
    return {
        "model": row.group.model,
        "method": row.group.method,
        "bits": row.bits,
        "seeds": len(row.seeds),
        "thresholds": how,
        "set": {"id": "id", "ood_mean": f"mean {name}"}.get(part, name),
        "score": score,
        "metric": metric,
        "fp32": one.a,
        "quantized": one.b,
        "change": one.difference,
        "low": one.low,
        "high": one.high,
    }


@checked
def results(directory: str | Path) -> Results:
    """The results of the study in `directory`, the --out of `quantlens study`. Raises StorageError where there is none
    or its store is damaged."""
    with Store(directory) as store:
        return Results(store.cells(), Path(directory))


def write_csv(directory: str | Path, target: str | Path) -> Path:
    """Write `Results.to_csv` of the study in `directory`, whole or not at all. Returns the path."""
    return write_whole(Path(target), results(directory).to_csv())


def write_parquet(directory: str | Path, target: str | Path) -> Path:
    """As `write_csv`, in the format of `Results.to_parquet`."""
    return write_whole(Path(target), results(directory).to_parquet())
