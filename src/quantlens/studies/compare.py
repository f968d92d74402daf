"""What changed between two models, methods or studies that were kept in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from quantlens.evaluation.compare import RESAMPLES, Comparison, compare_matches
from quantlens.evaluation.result import Result
from quantlens.studies.pairing import match, open_side


def compare(
    a: str | Path | Result,
    b: str | Path | Result,
    *,
    scores: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Compare two sides: stores, cells of a store, files or Results, as `pairing.open_side` takes them.

    The other arguments are those of `evaluation.compare.compare_matches`.

    Raises QuantlensError for sides that cannot be read or share no images, StorageError for damaged files.
    """
    first, second = open_side(a), open_side(b)
    matches, unpaired = match(first, second)
    return compare_matches(
        matches,
        a=first.name,
        b=second.name,
        unpaired=unpaired,
        scores=scores,
        resamples=resamples,
        seed=seed,
        progress=progress,
    )
