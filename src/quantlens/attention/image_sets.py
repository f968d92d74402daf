"""One image set as a float model and its quantized versions see it: maps, token norms, drift, image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlens.attention.drift import CHUNK, Drift, joined, map_drift, observe
from quantlens.attention.maps import MapSettings, maps_of
from quantlens.attention.recording import Lens
from quantlens.errors import QuantlensError

FP32 = "FP32"
MAP_BATCH = 16
"""Images whose gradient maps are computed at once."""

Told = Callable[[int, int], None]


@dataclass(repr=False)
class SetView:
    """n images of a set; every dictionary has the label of a model as its key, :data:`FP32` first.

    positions: which images of the set. maps [n, rows, columns]; rollout maps have 1 as their largest value, gradient
    maps are as they are. predicted [n]: classes; confidence [n]: their probabilities. norms [n, L, P] of the patch
    tokens after each of L blocks; outliers and large [n, L, P]: which of them are
    (:mod:`~quantlens.attention.outlier_tokens`). drift: of every quantized model. map_drift: of maps other than
    rollout. norms, outliers, large and drift are empty where attention is not over all tokens.
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

    def keep(self, label: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Put what a model saw in its places."""
        for name, values in arrays.items():
            getattr(self, name)[label] = values


def look_at(
    models: Mapping[str, Any], images: Any, positions: list[int], settings: MapSettings, progress: Told | None = None
) -> SetView:
    """What models see of some images of an :class:`~quantlens.data.ImageSet`.

    models: label -> :class:`Lens`, the first one the reference; plain models where attention is not over all tokens,
    whose gradient maps alone are then computed. progress: called with (images done, images in all).
    """
    if not positions:
        raise QuantlensError("there are no images to look at")
    view, told = SetView(images, positions), progress or (lambda done, total: None)
    if all(isinstance(lens, Lens) for lens in models.values()):
        _fill_in_drift(view, models, settings.rollout if settings.kind == "rollout" else {}, told)
    if settings.kind != "rollout":
        _fill_in_maps(view, models, settings, told)
    return view


def _fill_in_drift(view: SetView, lenses: Mapping[str, Lens], rollout: Mapping[str, Any], told: Told) -> None:
    """What one pass without gradients gives."""
    reference, *others = lenses
    found = []
    for batch in _batches(view, CHUNK, lenses[reference].device, told):
        found.append(observe(lenses[reference], {label: lenses[label] for label in others}, batch, rollout))
    for label, parts in zip(lenses, zip(*(seen for seen, _ in found), strict=True), strict=True):
        view.keep(label, joined(parts))
    view.drift = {label: Drift(**joined([drifts[label] for _, drifts in found])) for label in others}


def _fill_in_maps(view: SetView, models: Mapping[str, Any], settings: MapSettings, told: Told) -> None:
    """Maps of a class, and their drift."""
    found: dict[str, list[dict[str, np.ndarray]]] = {label: [] for label in models}
    first, *others = models
    for batch in _batches(view, MAP_BATCH, models[first].device, told):
        target: Any = settings.target
        for label, model in models.items():
            maps, probabilities = maps_of(model, batch, settings.kind, target=target, **settings.rollout)
            if target is None:
                target = probabilities.argmax(1)
            p = probabilities.detach().cpu().numpy()
            found[label].append({"maps": maps, "predicted": p.argmax(1), "confidence": p.max(1)})
    for label, parts in found.items():
        view.keep(label, joined(parts))
    view.map_drift = {label: map_drift(view.maps[first], view.maps[label]) for label in others}


def _batches(view: SetView, size: int, device: torch.device, told: Told) -> Iterator[Tensor]:
    """The images of a view, ready for the model, a few at a time."""
    for start in range(0, len(view), size):
        yield chosen(view.images, view.positions[start : start + size]).to(device)
        told(min(start + size, len(view)), len(view))


def evenly(count: int, wanted: int) -> list[int]:
    """``wanted`` evenly spaced positions among ``count`` (all, where there are fewer), the first among them."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def chosen(images: Any, positions: list[int]) -> Tensor:
    """Some images of an :class:`~quantlens.data.ImageSet`, ready for the model: float32 [n, 3, H, W]."""
    if images.values is not None:
        return images.values[positions]
    return images.preprocess.normalize(np.ascontiguousarray(images.pixels[positions]))
