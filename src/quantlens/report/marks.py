"""Marks on changes by quantization that may be chance: `studies.significance` says which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantlens.studies.text import count

SIGN = " ○"


def mark(board: Any, folder: Path | None, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Fill the board's `unsure` (group, precision, path of a metric) and the sentence that explains the sign."""
    if folder is None or not board.quantized:
        return
    from quantlens.studies.significance import Significance

    significance = Significance(folder)
    unsure: set[tuple[int, str, str]] = set()
    asked = missing = 0
    rows = sum(len(group.cells) for group in board.groups)
    for group in board.groups:
        baseline = (group.fp32 or {}).get("cell_key") if group.fp32_own else None
        for bits, results in group.cells.items():
            keys = [result.get("cell_key") for result in results]
            asked += 1
            if progress is not None:
                progress("resampling the changes", asked, rows)
            found = significance.not_significant(baseline, keys) if baseline and all(keys) else None
            if found is None:
                missing += 1
            else:
                unsure.update((group.index, bits, path) for path in found)
    significance.save()
    board.unsure = frozenset(unsure)
    board.unsure_note = _note(asked, missing)


def _note(asked: int, missing: int) -> str:
    if asked == 0:
        return ""
    without = "per-image outputs were not kept or are damaged"
    if missing == asked:
        return f"No change is marked as possible chance: {without} (see docs/compare.md)."
    text = (
        f"{SIGN.strip()} not significant: the 95 % interval of Δ, by a paired bootstrap over images and seeds, "
        "holds 0. Where nothing differs at all, one Δ in twenty still lacks the sign by chance."
    )
    if missing:
        text += f" {count(missing, 'row has', 'rows have')} no marks, as {without}."
    return text


def signed(board: Any, group: Any, bits: str, path: tuple[str, ...], text: str) -> str:
    """The text of a change with the sign where it is not significant."""
    return text + SIGN if (group.index, bits, ".".join(path)) in board.unsure else text
