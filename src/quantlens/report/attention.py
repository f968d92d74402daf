"""The report's section on attention: maps and token norms in pictures, drift against bits, and whether drift goes with
what is lost out of distribution. Everything from the results' "attention" and "attention_examples"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quantlens import _moved
from quantlens.attention.metrics import OUTLIERS, TABLED, WHERE, DriftMetric, summaries
from quantlens.report.attention_drift import LINK_COLUMNS, correlations, curves, stat_of
from quantlens.report.attention_gallery import Galleries, galleries
from quantlens.report.charts import GroupStyles, Panel, PanelRow
from quantlens.report.collect import Board, dig
from quantlens.report.tables import Row, Table, Value, seeds_text
from quantlens.report.text import MISSING, fixed, number


@dataclass
class Attention:
    """Everything of the section; ``reasons`` says of models without metrics why they have none."""

    pictures: Galleries = field(default_factory=Galleries)
    curves: list[PanelRow] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    scatter: list[Panel] = field(default_factory=list)
    links: list[list[str]] = field(default_factory=list)
    linked: str = ""
    n: str = ""
    reasons: list[str] = field(default_factory=list)


def attention(board: Board, styles: GroupStyles) -> Attention | None:
    """The section, or None for a study that did not ask for it."""
    results = [r for r in board.results if isinstance(r.get("attention"), Mapping)]
    if not results:
        return None
    found = Attention()
    reasons: dict[str, str] = {}
    for group in board.groups:
        for result in [r for rs in group.cells.values() for r in rs] + [group.fp32 or {}]:
            why = dig(result, ("attention", "unavailable"))
            if why:
                reasons[group.model] = str(why)
    found.reasons = [f"{model}: {why}." for model, why in reasons.items()]
    if not any(summaries(r, "id") for r in results):
        return found
    sizes = sorted({int(n) for r in results if (n := number(dig(r, ("attention", "id", "n")))) is not None})
    found.n = " to ".join(str(n) for n in dict.fromkeys((sizes[0], sizes[-1])))
    found.pictures = galleries(board)
    found.curves = curves(board, styles)
    found.tables = [t for t in (table_of(board, m) for m in (OUTLIERS, *TABLED)) if t is not None]
    found.scatter, found.links, found.linked = correlations(board, styles)
    return found


def table_of(board: Board, metric: DriftMetric) -> Table | None:
    """A metric by precision, on ID and on OOD images."""
    precisions = board.precisions
    rows = []
    for group in board.groups:
        values = []
        for where in WHERE:
            for bits in precisions:
                stat = stat_of(group, bits, where, metric)
                scaled = None if stat is None else stat.scaled(metric.factor)
                spread = "" if scaled is None or scaled.std is None else fixed(scaled.std, metric.digits)
                values.append(Value(fixed(None if scaled is None else scaled.mean, metric.digits), spread))
        rows.append(Row(group.model, group.method, seeds_text(group), values))
    if all(v.text == MISSING for row in rows for v in row.values):
        return None
    heads = [(title, precisions) for title in WHERE.values()]
    return Table(metric.title, heads, rows, more=metric is not OUTLIERS)


def __getattr__(name: str) -> object:
    """Names that have moved are found where they are now, with a warning."""
    return _moved.find(__name__, name)


__all__ = ["LINK_COLUMNS", "Attention", "attention"]
