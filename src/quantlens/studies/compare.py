"""What changed between two models, methods or studies that were kept in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from quantlens.evaluation.compare import RESAMPLES, Comparison, compare_matches
from quantlens.studies.pairing import match, open_side


def compare(
    a: str | Path,
    b: str | Path,
    *,
    scores: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Compare two sides (see `pairing.open_side`); the other arguments are those of `evaluation.compare_matches`.

    Raises QuantlensError for sides that cannot be read or share no images, StorageError for damaged files.
    """
    matches, unpaired = match(open_side(a), open_side(b))
    return compare_matches(
        matches, a=str(a), b=str(b), unpaired=unpaired, scores=scores, resamples=resamples, seed=seed, progress=progress
    )
