"""`write_report`: store → one HTML file. Styles and script are inlined and pinned by hash in a strict
content policy."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantlens._version import __version__
from quantlens.errors import QuantlensError, StorageError
from quantlens.files import write_whole
from quantlens.plots.style import chart_style

HERE = Path(__file__).parent
MANY_GROUPS = 6
"""With more models and methods than this, histograms and reliability diagrams start with one of them."""


def write_report(
    store_or_dir: Any,
    out: str | Path | None = None,
    *,
    title: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write the report of a study and return its path.

    store_or_dir: a directory that holds store.sqlite, or an object with `.cells()` and `.study()`.
    out: the HTML file; by default report.html in the study's directory. An existing file is replaced at once
    or not at all.
    progress: called with (what, done, in all) while changes are resampled, once per store.
    Raises QuantlensError for an empty store, StorageError where the file cannot be written.
    """
    from quantlens.report.collect import collect
    from quantlens.report.marks import mark
    from quantlens.studies import benchmarks
    from quantlens.studies.store import Store

    store, folder = open_store(store_or_dir)
    cells = list(store.cells())
    timings, artefacts, looked = [], [], []
    if isinstance(store, Store):
        timings, artefacts, looked = benchmarks.timed(store), benchmarks.evaluated(store), store.inspections()
    where = folder or "the store"
    if not cells and not timings and not artefacts and not looked:
        raise QuantlensError(f"{where} holds no cell yet, so there is nothing to report; run `quantlens study` first")
    if out is None and folder is None:
        raise QuantlensError("this store names no directory; say where to write the report with out=")
    target = Path(out) if out is not None else Path(folder or ".") / "report.html"
    if target.is_dir():
        target = target / "report.html"
    board = collect(cells, store.study(), timings, artefacts, looked)
    mark(board, folder, progress)
    page = render(board, title=title)
    write_whole(target, page, what="the report")
    return target


def open_store(store_or_dir: Any) -> tuple[Any, Path | None]:
    """(store, its directory or None)."""
    if isinstance(store_or_dir, str | os.PathLike):
        folder = Path(store_or_dir)
        if not (folder / "store.sqlite").is_file():
            raise StorageError(f"{folder} holds no store.sqlite; give the --out directory of a `quantlens study`")
        from quantlens.studies.store import Store

        return Store(folder), folder
    for name in ("directory", "dir", "folder", "root", "path"):
        found = getattr(store_or_dir, name, None)
        if isinstance(found, str | os.PathLike):
            folder = Path(found)
            return store_or_dir, folder.parent if folder.suffix == ".sqlite" else folder
    return store_or_dir, None


def render(board: Any, *, title: str | None = None) -> str:
    """The HTML text of a board."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = page_style(), (HERE / "assets" / "report.js").read_text(encoding="utf-8")
    context = page_context(board)
    name = title or board.study.get("name") or "Quantization report"
    return environment.get_template("report.html.j2").render(
        **context,
        title=str(name),
        version=__version__,
        policy=content_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        data=safe_json({"deltas": context["deltas"].by_score}),
    )


def page_context(board: Any) -> dict[str, Any]:
    """Every table, chart and sentence of the page, by its name in the templates."""
    from quantlens.report import attention as lens
    from quantlens.report import charts, distributions, frontier, inspection, runinfo, summary, tables, text
    from quantlens.report.decision import decision

    styles = charts.GroupStyles(board)
    histograms, histogram_note = distributions.histograms(board)
    rows = tables.set_rows(board)
    shipped = decision(board)
    return {
        "board": board,
        "sentences": [shipped.sentence] if shipped and not board.groups else summary.sentences(board),
        "decision": shipped,
        "tiles": [] if shipped and not board.groups else summary.tiles(board),
        "scope": summary.scope(board) if board.groups else "",
        "legend": styles.legend(),
        "split": styles.split,
        "scores": [(s, text.score_label(s)) for s in board.scores],
        "score": board.score or "",
        "score_name": text.score_label(board.score or ""),
        "table_1": tables.table_1(board),
        "table_2": tables.table_2(board),
        "figure_1": charts.figure_1(board, styles),
        "sensitivity": charts.sensitivity(board, styles),
        "mixed": frontier.mixed(board),
        "layers": inspection.layers(board),
        "attention": lens.attention(board, styles),
        "link_columns": lens.LINK_COLUMNS,
        "delta_panels": charts.change_bars(board, styles),
        "deltas": tables.delta_table(board),
        "set_columns": tables.SET_COLUMNS,
        "set_text_columns": tables.SET_TEXT_COLUMNS,
        "set_rows": rows,
        "set_filters": [
            (i, tables.SET_COLUMNS[i], list(dict.fromkeys(r[i] for r in rows)))
            for i in (5, 3, 2, 0, 1)
            if len({r[i] for r in rows}) > 1
        ],
        "histograms": histograms,
        "histogram_note": histogram_note,
        "reliability": distributions.reliability_diagrams(board, styles),
        "class_tables": tables.class_tables(board),
        "group_names": [g.name for g in board.groups],
        "first_group": "0" if len(board.groups) > MANY_GROUPS else "",
        "facts": runinfo.study_facts(board),
        "config": runinfo.config_text(board),
        "listings": runinfo.listings(board),
        "failures": runinfo.failures(board),
        "conventions": runinfo.conventions(board),
    }


def page_style() -> str:
    """The style of charts and page."""
    return chart_style() + (HERE / "assets" / "report.css").read_text(encoding="utf-8")


def content_policy(style: str, script: str) -> str:
    """Nothing is loaded from anywhere; only this style and this script run."""
    pins = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{pins[0]}'; script-src 'sha256-{pins[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def safe_json(value: Any) -> Any:
    """JSON that can stand inside a script element whatever text it holds."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
