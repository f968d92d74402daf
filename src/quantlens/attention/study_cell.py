"""What a study keeps of attention: drift of a model from the float one, and some images with their maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from PIL import Image

from quantlens.attention import pictures
from quantlens.attention.image_sets import FP32, SetView, evenly, look_at
from quantlens.attention.maps import MapSettings
from quantlens.attention.picture_grids import name_of
from quantlens.attention.recording import Lens
from quantlens.models.class_names import class_names
from quantlens.qmodel import float_model

THUMBNAIL = 96
MODEL = "model"


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
    predicted = int(view.predicted[MODEL][k])
    truth = None if images.labels is None or is_ood else int(images.labels[index])
    names = class_names(None if is_ood else images, lens.model)
    found = {
        "grid": list(lens.layout.grid),
        "truth": truth,
        "label": predicted,
        "class_name": name_of(names, predicted),
        "probability": round(float(view.confidence[MODEL][k]), 4),
        "rollout": [round(v, 3) for v in view.maps[MODEL][k].ravel().tolist()],
        "norms": {lens.blocks[b]: _short(view.norms[MODEL][k, b].tolist()) for b in _telling_blocks(view)},
    }
    if thumbnail:
        small = pictures.photograph(images, index)
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        found["thumbnail"] = pictures.webp(small, quality=75)
        found["truth_name"] = None if truth is None else name_of(names, truth)
    return found


def _telling_blocks(view: SetView) -> list[int]:
    """The last block, and the one with most outlier tokens in the float model, if it has any."""
    counts = view.outliers[FP32].sum(2).mean(0)
    return sorted({len(counts) - 1, *([int(counts.argmax())] if counts.max() > 0 else [])})


def _short(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
