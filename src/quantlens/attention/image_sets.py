"""One image set as a float model and its quantized versions see it: maps, token norms, drift, image by image; and what
a study keeps of its sets."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from quantlens.attention import pictures
from quantlens.attention.drift import CHUNK, Arrays, Drift, joined, map_drift, observe
from quantlens.attention.maps import MapSettings, maps_of
from quantlens.attention.recording import Lens
from quantlens.errors import QuantlensError
from quantlens.models.loading import class_names
from quantlens.qmodel import float_model

FP32, MODEL = "FP32", "model"
THUMBNAIL = 96
MAP_BATCH = 16
"""Images whose gradient maps are computed at once."""


@dataclass(repr=False)
class SetView:
    """n images of a set; every dictionary has the label of a model as its key, :data:`FP32` first.

    positions: which images of the set. maps [n, rows, columns]; rollout maps have 1 as their largest value, gradient
    maps are as they are. predicted [n]: classes; confidence [n]: their probabilities (none of a model of
    features). norms [n, L, P] of the patch tokens after each of L blocks; outliers and large [n, L, P]: which of them
    are (:func:`~quantlens.attention.drift.outlier_tokens`). drift: of every quantized model. map_drift: of maps other
    than rollout. norms, outliers, large and drift are empty where attention is not over all tokens.
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
        found: dict[str, Any] = {"n": len(self)}
        if self.predicted:
            found["prediction_changed"] = float((self.predicted[label] != self.predicted[FP32]).mean())
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
        for name, arrays in (("predicted", self.predicted), ("confidence", self.confidence)):
            columns |= {name: arrays[label], f"{name}_fp32": arrays[FP32]} if arrays else {}
        if label in self.drift:
            columns |= self.drift[label].per_image()
        columns |= {f"map_{k}": v for k, v in self.map_drift.get(label, {}).items()}
        return [{name: values[i].item() for name, values in columns.items()} for i in range(len(self))]

    def keep(self, parts: Sequence[dict[str, Arrays]]) -> None:
        """Put what models saw of successive images in its places: label -> name -> values."""
        for label, arrays in joined(parts).items():
            for name, values in arrays.items():
                getattr(self, name)[label] = values


def look_at(
    models: Mapping[str, Any],
    images: Any,
    positions: list[int],
    settings: MapSettings,
    progress: Callable[[int, int], None] | None = None,
) -> SetView:
    """What models see of some images of an :class:`~quantlens.data.ImageSet`.

    models: label -> :class:`Lens`, the first one the reference; plain models where attention is not over all tokens,
    whose gradient maps alone are then computed. progress: called with (images done, images in all).
    """
    if not positions:
        raise QuantlensError("there are no images to look at")
    view = SetView(images, positions)
    first, *others = models

    def batches(size: int) -> Iterator[Tensor]:
        for start in range(0, len(view), size):
            yield chosen(images, positions[start : start + size]).to(models[first].device)
            if progress is not None:
                progress(min(start + size, len(view)), len(view))

    if isinstance(models[first], Lens):
        rollout = settings.rollout if settings.kind == "rollout" else {}
        found = [observe(models, batch, rollout) for batch in batches(CHUNK)]
        view.keep([seen for seen, _ in found])
        view.drift = {label: Drift(**arrays) for label, arrays in joined([drifts for _, drifts in found]).items()}
    if settings.kind != "rollout":
        view.keep([_maps_of_classes(models, batch, settings) for batch in batches(MAP_BATCH)])
        view.map_drift = {label: map_drift(view.maps[first], view.maps[label]) for label in others}
    return view


def _maps_of_classes(models: Mapping[str, Any], images: Tensor, settings: MapSettings) -> dict[str, Arrays]:
    """Maps of a class (by default the one that the first model predicts), and what models predict: label -> arrays."""
    target: Any = settings.target
    found = {}
    for label, model in models.items():
        maps, probabilities = maps_of(model, images, settings.kind, target=target, **settings.rollout)
        if target is None:
            target = probabilities.argmax(1)
        p = probabilities.detach().cpu().numpy()
        found[label] = {"maps": maps, "predicted": p.argmax(1), "confidence": p.max(1)}
    return found


def evenly(count: int, wanted: int) -> list[int]:
    """``wanted`` evenly spaced positions among ``count`` (all, where there are fewer), the first among them."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def chosen(images: Any, positions: list[int]) -> Tensor:
    """Some images of an :class:`~quantlens.data.ImageSet`, ready for the model: float32 [n, 3, H, W]."""
    if images.values is not None:
        return images.values[positions]
    return images.preprocess.normalize(np.ascontiguousarray(images.pixels[positions]))


def name_of(names: list[str] | None, index: int) -> str | None:
    """The first of a class's names: "tench" of "tench, Tinca tinca". None where they are unknown, and of one logit."""
    return None if names is None or len(names) == 1 or index >= len(names) else names[index].split(",")[0]


def truth_of(images: Any, index: int, names: list[str] | None) -> tuple[int | None, str | None]:
    """(label of an image, its name where that is known): of a set with other classes than the model's its own name."""
    if images.labels is None or images.labels.ndim > 1:
        return None, None
    own, truth = images.class_names, int(images.labels[index])
    return truth, name_of(names if own is None or len(own) == len(names or ()) else own, truth)


# -- what a study keeps -----------------------------------------------------------------------------------------------
def survey(
    reference: Any,
    model: Any,
    id: Any,
    ood: Mapping[str, Any] | None = None,
    *,
    images: int = 64,
    show: int = 4,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """What a study keeps of the attention of ``model``: {"attention", "attention_examples"}.

    reference: the float model, which ``model`` may be. id, ood: ImageSets. images: of each set so many, evenly spaced.
    show: so many of these, evenly spaced, with their maps.

    "attention" is {"id": summary, "ood": {name: summary}} (:meth:`Drift.summary`); "attention_examples" a list of
    :func:`example`. Raises UnsupportedError for models without global attention.
    """
    first = Lens(reference)
    lens = first if float_model(model) is first.model else Lens(model)
    summaries: dict[tuple[str, bool], Any] = {}
    examples = []
    for name, image_set, is_ood in [("id", id, False), *((n, s, True) for n, s in (ood or {}).items())]:
        told = progress and partial(progress, f"attention on {name}")
        view = look_at({FP32: first, MODEL: lens}, image_set, evenly(len(image_set), images), MapSettings(), told)
        summaries[name, is_ood] = view.drift[MODEL].summary()
        for k in evenly(len(view), show):
            about = {"set": name, "ood": is_ood, "index": view.positions[k]}
            examples.append(about | example(view, k, lens, is_ood=is_ood, thumbnail=lens is first))
    of_ood = {name: summary for (name, is_ood), summary in summaries.items() if is_ood}
    return {"attention": {"id": summaries["id", False], "ood": of_ood}, "attention_examples": examples}


def example(view: SetView, k: int, lens: Lens, *, is_ood: bool, thumbnail: bool) -> dict[str, Any]:
    """The k-th image of a view as the model sees it, ready for JSON: {grid, truth, label, class_name, probability,
    rollout, norms: {block: norms of patch tokens}}.

    The norms are those after the last block and after the one where the float model has most outlier tokens.
    thumbnail: a "thumbnail" too (base64 of a WebP file of at most 96 pixels) and "truth_name", of the float model.
    """
    images, index = view.images, view.positions[k]
    names = class_names(None if is_ood else images, lens.model)
    truth, truth_name = (None, None) if is_ood else truth_of(images, index, names)
    found: dict[str, Any] = {
        "grid": list(lens.layout.grid),
        "truth": truth,
        "rollout": [round(v, 3) for v in view.maps[MODEL][k].ravel().tolist()],
        "norms": {
            lens.blocks[b]: [float(f"{v:.4g}") for v in view.norms[MODEL][k, b].tolist()] for b in _telling_blocks(view)
        },
    }
    if view.predicted:
        found["label"] = predicted = int(view.predicted[MODEL][k])
        found["class_name"] = name_of(names, predicted)
        found["probability"] = round(float(view.confidence[MODEL][k]), 4)
    if thumbnail:
        small = pictures.photograph(images, index)
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        found["thumbnail"] = pictures.webp(small, quality=75)
        found["truth_name"] = truth_name
    return found


def _telling_blocks(view: SetView) -> list[int]:
    """The last block, and the one with most outlier tokens in the float model, if it has any."""
    counts = view.outliers[FP32].sum(2).mean(0)
    return sorted({len(counts) - 1, *([int(counts.argmax())] if counts.max() > 0 else [])})
