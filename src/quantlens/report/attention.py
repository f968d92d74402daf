"""The report's section on attention: maps and token norms in pictures, drift against bits, and whether drift goes with
what is lost out of distribution. Everything from the results' "attention" and "attention_examples"."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from quantlens import _moved
from quantlens.attention.metrics import OUTLIERS, TABLED, WHERE, DriftMetric, summaries
from quantlens.plots.precisions import PART_NAMES
from quantlens.report.attention_gallery import Galleries, galleries
from quantlens.report.tables import Column, Table, by_precision
from quantlens.studies.board import Board, dig
from quantlens.studies.drift import Link, drift_of, links
from quantlens.studies.text import MISSING, count, fixed, number, score_label, span

LINK_COLUMNS = [
    "Drift",
    "Measured on",
    "Cells",
    "Pearson",
    "Spearman",
    "95 % interval",
    "Spearman within precisions",
]


@dataclass
class Attention:
    """Everything of the section; ``reasons`` says of models without metrics why they have none."""

    reasons: list[str]
    n: str = ""
    pictures: Galleries | None = None
    tables: list[Table] = field(default_factory=list)
    links: list[list[str]] = field(default_factory=list)
    linked: str = ""


def attention(board: Board) -> Attention | None:
    """The section, or None for a study that did not ask for it."""
    results = [r for r in board.results if r.get("attention")]
    if not results:
        return None
    reasons = {r["model"]: r["attention"]["unavailable"] for r in results if "unavailable" in r["attention"]}
    found = Attention([f"{model}: {why}." for model, why in reasons.items()])
    if not any(summaries(r, "id") for r in results):
        return found
    found.n = span(int(n) for r in results if (n := number(dig(r, ("attention", "id", "n")))) is not None)
    found.pictures = galleries(board)
    found.tables = [table for metric in (OUTLIERS, *TABLED) if (table := table_of(board, metric)) is not None]
    found.links = [_link(link) for link in links(board)]
    if board.ood_path is not None:
        found.linked = f"AUPR-out by {score_label(board.ood_path[2])}, {PART_NAMES[board.ood_path[1]]}"
    return found


def table_of(board: Board, metric: DriftMetric) -> Table | None:
    """A metric by precision, on ID and on OOD images."""
    columns = [Column(title, partial(drift_of, where, metric), metric.digits) for where, title in WHERE.items()]
    return by_precision(board, metric.title, columns, more=metric is not OUTLIERS)


def _link(link: Link) -> list[str]:
    found = link.found
    return [
        link.metric.title,
        "ID" if link.where == "id" else "OOD",
        f"{found.n} ({count(found.conditions, 'condition')})",
        fixed(found.pearson, 2),
        fixed(found.spearman, 2),
        MISSING if found.low is None else f"{fixed(found.low, 2)} to {fixed(found.high, 2)}",
        fixed(found.within, 2),
    ]


def __getattr__(name: str) -> object:
    """Names that have moved are found where they are now, with a warning."""
    return _moved.find(__name__, name)
