"""The guard of an exported file: an out-of-distribution score of the logits and the threshold below which an image
looks unknown; how the threshold is chosen, and how often it is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantlens.metrics.ood_scores.logits import energy, maxlogit, msp
from quantlens.qmodel import QuantizedModel

GUARDS = {"msp": msp, "energy": energy, "maxlogit": maxlogit}
"""Scores that a file can carry; larger means more in-distribution."""

KEEP = 0.95
"""Share of in-distribution images that the threshold keeps."""


def guard_threshold(qmodel: QuantizedModel, images: Any, guard: str, keep: float = KEEP) -> dict[str, Any]:
    """{"value", "n"}: the score that at least the share ``keep`` of the in-distribution images reaches."""
    import torch

    from quantlens.calibration import Calibration

    found = []
    with torch.inference_mode():
        for batch in Calibration.of(images, qmodel.preprocess, device=qmodel.device):
            found.append(GUARDS[guard](qmodel(batch).cpu().numpy()))
    scores = np.concatenate(found)
    return {"value": _threshold(scores, keep), "n": len(scores)}


def _threshold(scores: np.ndarray, keep: float) -> float:
    """The largest of the scores [n] that at least the share ``keep`` of them reaches."""
    return float(np.sort(scores)[min(int(len(scores) * (1 - keep)), len(scores) - 1)])


def looks_unknown(guard: Mapping[str, Any] | None, logits: np.ndarray) -> np.ndarray | None:
    """Which images [n] a file's guard calls unknown, from its logits [n, K]; None without a threshold.

    guard: ``{"score", "keep", "threshold": {"value", "n"} or None}``, as the file's metadata holds it.
    """
    threshold = (guard or {}).get("threshold")
    if guard is None or not threshold:
        return None
    return GUARDS[guard["score"]](logits) < float(threshold["value"])


def guard_metrics(
    guard: Mapping[str, Any] | None, known: np.ndarray | None, others: Mapping[str, np.ndarray | None]
) -> dict[str, Any] | None:
    """How often a guard is right on images that it was not set on; None for a guard without a threshold.

    known: :func:`looks_unknown` of the in-distribution images; others: that of every OOD set.
    Returns the guard itself with ``"id": {"n", "kept"}`` (share of ID images that look known) and for every OOD set
    ``{"n", "flagged", "balanced_accuracy"}`` (share that looks unknown; mean of kept and flagged).
    """
    if guard is None or known is None:
        return None
    kept = float((~known).mean())
    sets: dict[str, Any] = {}
    for name, unknown in others.items():
        if unknown is not None:
            flagged = float(unknown.mean())
            sets[name] = {"n": len(unknown), "flagged": flagged, "balanced_accuracy": (kept + flagged) / 2}
    return {**guard, "id": {"n": len(known), "kept": kept}, "ood": sets}
