"""One image set as a float model and its quantized versions see it: maps, token norms, drift, image by image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantlens.attention.maps import MapSettings, map_drift, maps_of
from quantlens.attention.measure import Drift, Seen, measure
from quantlens.attention.recording import Lens
from quantlens.attention.selection import chosen
from quantlens.errors import QuantlensError
from quantlens.qmodel import float_model

FP32 = "FP32"
BATCH = 64
MAP_BATCH = 16
"""Images whose gradient maps are computed at once."""


@dataclass(repr=False)
class SetView:
    """n images of a set; every dictionary has the label of a model as its key, :data:`FP32` first.

    positions: which images of the set. maps [n, rows, columns]; rollout maps have 1 as their largest value, gradient
    maps are as they are. predicted [n]: classes; confidence [n]: their probabilities. norms [n, L, P] of the patch
    tokens after each of L blocks; outliers and large [n, L, P]: which of them are (:mod:`~quantlens.attention.tokens`).
    drift: of every quantized model. map_drift: of maps other than rollout. norms, outliers, large and drift are empty
    where attention is not over all tokens.
    """

    images: Any
    positions: list[int]
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    predicted: dict[str, np.ndarray] = field(default_factory=dict)
    confidence: dict[str, np.ndarray] = field(default_factory=dict)
    norms: dict[str, np.ndarray] = field(default_factory=dict)
    outliers: dict[str, np.ndarray] = field(default_factory=dict)
    large: dict[str, np.ndarray] = field(default_factory=dict)
    drift: dict[str, Drift] = field(default_factory=dict)
    map_drift: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        return f"SetView({self.images.source!r}, {len(self)} images by {', '.join(self.maps)})"

    def summary(self, label: str) -> dict[str, Any]:
        """Means over the images of a quantized model's drift: :meth:`Drift.summary`, with ``map_spearman``,
        ``map_overlap`` and ``map_movement`` of maps other than rollout."""
        changed = self.predicted[label] != self.predicted[FP32]
        found: dict[str, Any] = {"n": len(self), "prediction_changed": float(changed.mean())}
        if label in self.drift:
            found = self.drift[label].summary()
        means = {f"map_{k}": float(v.mean(dtype=np.float64)) for k, v in self.map_drift.get(label, {}).items()}
        return found | means

    def correlation(self, label: str) -> np.ndarray:
        """Rank correlation of each image's map with FP32's: [n]."""
        return self.map_drift[label]["spearman"] if self.map_drift else self.drift[label].rollout_spearman

    def per_image(self, label: str) -> list[dict[str, Any]]:
        """A quantized model's drift as one row per image, rows of attention and tokens over all blocks and heads."""
        columns: dict[str, np.ndarray] = {"image": np.asarray(self.positions)}
        columns |= {"predicted": self.predicted[label], "predicted_fp32": self.predicted[FP32]}
        columns |= {"confidence": self.confidence[label], "confidence_fp32": self.confidence[FP32]}
        if label in self.drift:
            columns |= self.drift[label].per_image()
        columns |= {f"map_{k}": v for k, v in self.map_drift.get(label, {}).items()}
        return [{name: values[i].item() for name, values in columns.items()} for i in range(len(self))]


def look_at(
    reference: Any,
    models: Mapping[str, Any],
    images: Any,
    positions: list[int],
    settings: MapSettings,
    progress: Callable[[int, int], None] | None = None,
) -> SetView:
    """What models see of some images of an :class:`~quantlens.data.ImageSet`.

    reference, models (label -> model): as :class:`Lens`; plain models where attention is not over all tokens, whose
    gradient maps alone are then computed. progress: called with (images done, images in all). Raises QuantlensError
    where another model than the reference is called FP32.
    """
    if models.get(FP32, reference) is not reference:
        raise QuantlensError(f"{FP32} is what the float model is called; give the quantized one another label")
    if not positions:
        raise QuantlensError("there are no images to look at")
    view, lenses = SetView(images, positions), {FP32: reference, **models}

    def told(done: int) -> None:
        if progress is not None:
            progress(done, len(positions))

    if all(isinstance(lens, Lens) for lens in lenses.values()):
        _drift(view, reference, models, settings, told)
    if settings.kind != "rollout":
        _gradient_maps(view, lenses, settings, told)
    return view


def _drift(
    view: SetView, reference: Any, models: Mapping[str, Any], settings: MapSettings, told: Callable[[int], None]
) -> None:
    """Fill in what one pass without gradients gives."""
    kept: dict[str, dict[str, list[np.ndarray]]] = {label: {} for label in (FP32, *models)}

    def keep(label: str | None, start: int, seen: Seen) -> None:
        if label == FP32:
            return  # the reference itself, kept already
        found = kept[FP32 if label is None else label]
        for name, values in (
            ("maps", seen.map.unflatten(1, seen.layout.grid)),
            ("predicted", seen.predicted),
            ("confidence", seen.confidence),
            ("norms", seen.norms),
            ("outliers", seen.outliers),
            ("large", seen.large),
        ):
            found.setdefault(name, []).append(values.cpu().numpy())

    rollout = settings.rollout if settings.kind == "rollout" else {}
    view.drift = drifts(reference, models, view.images, view.positions, progress=told, keep=keep, **rollout)
    for label, found in kept.items():
        for name, values in found.items():
            getattr(view, name)[label] = np.concatenate(values)


def _gradient_maps(
    view: SetView, lenses: Mapping[str, Any], settings: MapSettings, told: Callable[[int], None]
) -> None:
    """Fill in maps of a class, and their drift."""
    maps: dict[str, list[np.ndarray]] = {label: [] for label in lenses}
    seen: dict[str, list[np.ndarray]] = {label: [] for label in lenses}
    device = _model(lenses[FP32]).device
    for start in range(0, len(view), MAP_BATCH):
        batch = chosen(view.images, view.positions[start : start + MAP_BATCH]).to(device)
        target: Any = settings.target
        for label, model in lenses.items():
            values, probabilities = maps_of(model, batch, settings.kind, target=target, **settings.rollout)
            if target is None:
                target = probabilities.argmax(1)
            maps[label].append(values)
            seen[label].append(probabilities.detach().cpu().numpy())
        told(min(start + MAP_BATCH, len(view)))
    view.maps = {label: np.concatenate(parts) for label, parts in maps.items()}
    probability = {label: np.concatenate(parts) for label, parts in seen.items()}
    view.predicted = {label: p.argmax(1) for label, p in probability.items()}
    view.confidence = {label: p.max(1) for label, p in probability.items()}
    view.map_drift = {label: map_drift(view.maps[FP32], m) for label, m in view.maps.items() if label != FP32}


def drifts(
    reference: Any,
    models: Mapping[str, Any],
    images: Any,
    positions: list[int],
    *,
    progress: Callable[[int], None] | None = None,
    keep: Callable[[str | None, int, Seen], None] | None = None,
    **rollout: Any,
) -> dict[str, Drift]:
    """:func:`~quantlens.attention.measure.measure` on some images of a set, on the device that the models are on."""
    lens = reference if isinstance(reference, Lens) else Lens(reference)
    parts = (positions[i : i + BATCH] for i in range(0, len(positions), BATCH))
    batches = (chosen(images, part).to(lens.model.device) for part in parts)
    return measure(lens, models, batches, progress=progress, keep=keep, **rollout)


def _model(lens: Any) -> Any:
    return lens.model if isinstance(lens, Lens) else float_model(lens)
