"""OOD scores of one model: which, and of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.metrics import ScoreInfo, Scorer, available_scores


def choose_scores(names: Sequence[str] | None) -> dict[str, ScoreInfo]:
    """name -> ScoreInfo of the scores asked for, in that order (None: all of quantlens' own). A score is found by its
    name, label or title; case and what stands between words do not matter. Raises UnknownNameError."""
    if names is None:
        return available_scores(own=True)
    known = available_scores()
    spellings = {_letters(text): name for name, info in known.items() for text in (info.title, info.label)}
    spellings |= {_letters(name): name for name in known}
    found = {}
    for asked in names:
        name = asked if asked in known else spellings.get(_letters(asked))
        if name is None:
            raise UnknownNameError("OOD score", str(asked), known)
        found[name] = known[name]
    return found


def _letters(text: str) -> str:
    return "".join(c for c in str(text).lower() if c.isalnum())


def scored(scorers: Mapping[str, Scorer], logits: np.ndarray, features: np.ndarray | None) -> dict[str, np.ndarray]:
    """Every score [N] float64 of images, larger = more in-distribution, from logits [N, K] and features [N, D]."""
    found = {name: np.asarray(scorer(logits, features), dtype=np.float64) for name, scorer in scorers.items()}
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise QuantlensError(f"the OOD score {name!r} is not finite on these images; leave it out with `scores`")
    return found
