"""Drift over a set of images: how far quantized models' attention is from the float model's, image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlens.attention import drift, tokens
from quantlens.attention.recording import Lens, View
from quantlens.errors import QuantlensError
from quantlens.metrics.divergence import kl_divergence

TOP = 0.1
"""Share of patches whose overlap is measured (the 20 largest of 196)."""

CHUNK = 8
"""Images looked at at once: maps of more of them (45 MB for 8 of DeiT-Tiny) cost time, as they leave the cache."""


@dataclass(frozen=True)
class Drift:
    """Drift of one quantized model on n images: float32 arrays, first dimension the image.

    cosine, kl, entropy_change [n, L, H]: of attention rows (class and patch tokens alike), mean over rows; L blocks, H
    heads. rollout_spearman, rollout_overlap, centre_movement [n]: of rollout maps; overlap of the :data:`TOP` largest
    patches; movement as a share of the image's diagonal. outliers, large [n, L]: outlier tokens and large tokens after
    every block (:mod:`~quantlens.attention.tokens`), outliers_reference and large_reference those of the float model;
    outlier_overlap [n, L]: positions in common (intersection over union). predicted, predicted_reference [n]: classes.
    confidence, confidence_reference [n]. output_kl [n]: KL(float ‖ quantized) of the class probabilities, nats.
    """

    cosine: np.ndarray
    kl: np.ndarray
    entropy_change: np.ndarray
    rollout_spearman: np.ndarray
    rollout_overlap: np.ndarray
    centre_movement: np.ndarray
    outliers: np.ndarray
    outliers_reference: np.ndarray
    outlier_overlap: np.ndarray
    large: np.ndarray
    large_reference: np.ndarray
    predicted: np.ndarray
    predicted_reference: np.ndarray
    confidence: np.ndarray
    confidence_reference: np.ndarray
    output_kl: np.ndarray

    def __len__(self) -> int:
        return len(self.output_kl)

    def per_image(self) -> dict[str, np.ndarray]:
        """One value per image and metric [n]: means over blocks and heads, numbers of tokens over all blocks."""
        return {
            "row_cosine": self.cosine.mean(axis=(1, 2), dtype=np.float64),
            "row_kl": self.kl.mean(axis=(1, 2), dtype=np.float64),
            "entropy_change": self.entropy_change.mean(axis=(1, 2), dtype=np.float64),
            "rollout_spearman": self.rollout_spearman,
            "rollout_overlap": self.rollout_overlap,
            "centre_movement": self.centre_movement,
            "outliers": self.outliers.sum(axis=1),
            "outliers_fp32": self.outliers_reference.sum(axis=1),
            "outlier_overlap": self.outlier_overlap.mean(axis=1, dtype=np.float64),
            "large_tokens": self.large.sum(axis=1),
            "large_tokens_fp32": self.large_reference.sum(axis=1),
            "prediction_changed": self.predicted != self.predicted_reference,
            "confidence_change": self.confidence - self.confidence_reference,
            "output_kl": self.output_kl,
        }

    def summary(self) -> dict[str, Any]:
        """Means over images as JSON-able numbers, and per block (``blocks``) and head (``heads``, [L][H])."""

        def mean(values: np.ndarray) -> float:
            return float(values.mean(dtype=np.float64))

        def listed(values: np.ndarray) -> list:
            return np.asarray(values.mean(axis=0, dtype=np.float64)).round(6).tolist()

        return {
            "n": len(self),
            "row_cosine": mean(self.cosine),
            "row_kl": mean(self.kl),
            "entropy_change": mean(self.entropy_change),
            "rollout_spearman": mean(self.rollout_spearman),
            "rollout_overlap": mean(self.rollout_overlap),
            "centre_movement": mean(self.centre_movement),
            "outliers": mean(self.outliers.sum(axis=1)),
            "outliers_fp32": mean(self.outliers_reference.sum(axis=1)),
            "outlier_overlap": mean(self.outlier_overlap),
            "large_tokens": mean(self.large.sum(axis=1)),
            "large_tokens_fp32": mean(self.large_reference.sum(axis=1)),
            "prediction_changed": mean(self.predicted != self.predicted_reference),
            "confidence_change": mean(self.confidence - self.confidence_reference),
            "output_kl": mean(self.output_kl),
            "blocks": {
                "row_cosine": listed(self.cosine.mean(axis=2)),
                "row_kl": listed(self.kl.mean(axis=2)),
                "outliers": listed(self.outliers),
                "outliers_fp32": listed(self.outliers_reference),
                "outlier_overlap": listed(self.outlier_overlap),
            },
            "heads": {"row_cosine": listed(self.cosine), "row_kl": listed(self.kl)},
        }


def measure(
    reference: Any,
    others: Mapping[str, Any],
    batches: Iterable[Tensor],
    *,
    progress: Callable[[int], None] | None = None,
    keep: Callable[[str | None, int, Seen], None] | None = None,
    **rollout: Any,
) -> dict[str, Drift]:
    """Drift of ``others`` (label -> model) from ``reference`` on batches of images [B, 3, H, W].

    One forward pass per model and batch; of the maps only those of :data:`CHUNK` images are alive. progress: called
    with the number of images done. keep: called with the label (None: the reference), the number of the first image
    and what was seen of these images, for a caller who wants some of it. rollout: settings of
    :func:`~quantlens.attention.rollout.rollout`.
    Raises QuantlensError without images, UnsupportedError for models without global attention.
    """
    first = reference if isinstance(reference, Lens) else Lens(reference)
    lenses = {label: model if isinstance(model, Lens) else Lens(model) for label, model in others.items()}
    parts: dict[str, list[dict[str, np.ndarray]]] = {label: [] for label in lenses}
    done = 0
    with torch.inference_mode():
        for images in (part for batch in batches for part in batch.split(CHUNK)):
            seen = _Reference(first, first(images), rollout)
            if keep is not None:
                keep(None, done, seen)
            for label, lens in lenses.items():
                other = seen if lens.model is first.model else Seen(lens, lens(images), rollout)
                if keep is not None:
                    keep(label, done, other)
                found = _compare(seen, other)
                parts[label].append({name: value.cpu().numpy() for name, value in found.items()})
            done += len(images)
            if progress is not None:
                progress(done)
    if not done:
        raise QuantlensError("no images to measure attention drift on")
    return {
        label: Drift(**{f.name: np.concatenate([p[f.name] for p in batch]) for f in fields(Drift)})
        for label, batch in parts.items()
    }


class Seen:
    """What is derived from a view of B images: ``map`` [B, P]; ``norms`` of patch tokens and which of them are
    ``outliers`` and ``large`` [B, L, P]; ``predicted`` and ``confidence`` [B]."""

    def __init__(self, lens: Lens, view: View, rollout: dict[str, Any]):
        self.view, self.layout = view, lens.layout
        self.map = lens.rollout_of(view, **rollout)
        self.norms = torch.stack([tokens.token_norms(t, lens.layout.prefix) for t in view.tokens], dim=1)
        self.outliers, self.large = tokens.outliers(self.norms), tokens.large(self.norms)
        self.log_probabilities = view.logits.log_softmax(1)
        self.confidence, self.predicted = view.logits.softmax(1).max(1)


class _Reference(Seen):
    """The same of the reference, with its rows, which every model is compared with."""

    def __init__(self, lens: Lens, view: View, rollout: dict[str, Any]):
        super().__init__(lens, view, rollout)
        self.rows = [drift.Rows(p).drop_logs() for p in view.probs]


def _compare(a: _Reference, b: Seen) -> dict[str, Tensor]:
    if len(a.view.probs) != len(b.view.probs) or a.layout != b.layout:
        raise QuantlensError("the two models have different blocks or patches; drift compares one model's precisions")
    rows = []
    for first, probs in zip(a.rows, b.view.probs, strict=True):
        second = drift.Rows(probs)
        change = (second.entropy - first.entropy).mean(-1)
        rows.append((first.cosine_to(second), first.kl_to(second), change))
    cosine, kl, entropy_change = (torch.stack(values, dim=1) for values in zip(*rows, strict=True))
    top = max(1, round(TOP * a.layout.patches))
    p, q = a.log_probabilities, b.log_probabilities
    return {
        "cosine": cosine,
        "kl": kl,
        "entropy_change": entropy_change,
        "rollout_spearman": drift.spearman(a.map, b.map),
        "rollout_overlap": drift.top_overlap(a.map, b.map, top),
        "centre_movement": drift.movement(a.map, b.map, a.layout.grid),
        "outliers": b.outliers.sum(-1).float(),
        "outliers_reference": a.outliers.sum(-1).float(),
        "outlier_overlap": tokens.overlap(a.outliers, b.outliers),
        "large": b.large.sum(-1).float(),
        "large_reference": a.large.sum(-1).float(),
        "predicted": b.predicted,
        "predicted_reference": a.predicted,
        "confidence": b.confidence,
        "confidence_reference": a.confidence,
        "output_kl": kl_divergence(p, q),
    }
