"""`write_report`: store → one HTML file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantlens.errors import QuantlensError
from quantlens.files import write_whole

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
    from quantlens.studies.board import board_of, open_store
    from quantlens.studies.significance import mark

    store, folder = open_store(store_or_dir)
    board = board_of(store)
    if out is None and folder is None:
        raise QuantlensError("this store names no directory; say where to write the report with out=")
    target = Path(out) if out is not None else Path(folder or ".") / "report.html"
    if target.is_dir():
        target = target / "report.html"
    mark(board, folder, progress)
    return write_whole(target, render(board, title=title, progress=progress), what="the report")


def render(board: Any, *, title: str | None = None, progress: Callable[[str, int, int], None] | None = None) -> str:
    """The HTML text of a board."""
    from quantlens.report import page

    context = page_context(board, progress)
    return page.render(
        "report.html.j2",
        shown=(board.score or "", board.lowest or ""),
        title=str(title or board.study.get("name") or "Quantization report"),
        data={"deltas": context["deltas"]["by_score"]},
        **context,
    )


def page_context(board: Any, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Every table, figure and sentence of the page, by its name in the templates."""
    from quantlens.plots import FIGURES
    from quantlens.plots.precisions import GroupLines
    from quantlens.plots.style import GLYPHS
    from quantlens.report import attention, boxes, frontier, inspection, operating, runinfo, summary, tables
    from quantlens.report.decision import decision
    from quantlens.report.shift import shift
    from quantlens.studies import text

    rows = tables.set_rows(board)
    shipped, point = decision(board), operating.section(board, progress)
    return {
        "board": board,
        "figures": {name: make(board) for name, (_, make) in FIGURES.items()},
        "sentences": [shipped["sentence"]] if shipped and not board.groups else summary.sentences(board),
        "decision": shipped,
        "tiles": [] if shipped and not board.groups else summary.tiles(board),
        "id_sizes": tables.id_sizes(board),
        "sets_by_kind": summary.sets_by_kind(board),
        "legend": [(name, GLYPHS[look.form], look.colour) for name, look in GroupLines(board).looks.items()],
        "scores": [(s, text.score_label(s)) for s in board.scores],
        "score": board.score or "",
        "score_name": text.score_label(board.score or ""),
        "table_1": tables.table_1(board),
        "table_2": tables.table_2(board),
        "widths": frontier.widths(board),
        "operating": point,
        "layers": inspection.layers(board),
        "boxes": boxes.boxes(board),
        "shift": shift(board),
        "attention": attention.attention(board),
        "link_columns": attention.LINK_COLUMNS,
        "deltas": tables.delta_table(board),
        "set_columns": tables.SET_COLUMNS,
        "set_text_columns": tables.SET_TEXT_COLUMNS,
        "set_rows": rows,
        "set_filters": [
            (i, tables.SET_COLUMNS[i], list(dict.fromkeys(r[i] for r in rows)))
            for i in (5, 3, 2, 0, 1)
            if len({r[i] for r in rows}) > 1
        ],
        "class_tables": tables.class_tables(board, point["losses"] if point else {}),
        "group_names": [g.name for g in board.groups],
        "first_group": "0" if len(board.groups) > MANY_GROUPS else "",
        "facts": runinfo.study_facts(board),
        "config": runinfo.config_text(board),
        "again": runinfo.again(board),
        "listings": runinfo.listings(board),
        "failures": runinfo.failures(board),
        "bins": runinfo.bins(board),
        "fits": runinfo.fits(board),
    }
