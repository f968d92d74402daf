"""What a study keeps of attention: drift of every model from the float one, and some images with their maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from quantlens.attention import pictures
from quantlens.attention.maps import MapSettings
from quantlens.attention.recording import Lens
from quantlens.attention.selection import evenly, name_of, photograph
from quantlens.attention.sets import FP32, SetView, look_at
from quantlens.models.class_names import class_names
from quantlens.qmodel import float_model

THUMBNAIL = 96

Progress = Callable[[str, int, int], None]


def survey(
    reference: Any,
    models: Mapping[str, Any],
    id: Any,
    ood: Mapping[str, Any] | None = None,
    *,
    images: int = 64,
    show: int = 4,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """What a study keeps of the attention of ``models`` (label -> model): label -> {"attention", "attention_examples"}.

    reference: the float model. id, ood: ImageSets. images: of each set so many, evenly spaced. show: so many of these,
    evenly spaced, with their maps.

    "attention" is {"id": summary, "ood": {name: summary}} (:meth:`Drift.summary`); "attention_examples" a list of
    :func:`example`. Raises UnsupportedError for models without global attention.
    """
    lens = reference if isinstance(reference, Lens) else Lens(reference)
    lenses = {label: lens if float_model(m) is lens.model else Lens(m) for label, m in models.items()}
    found: dict[str, dict[str, Any]] = {
        label: {"attention": {"id": None, "ood": {}}, "attention_examples": []} for label in models
    }
    for name, image_set, is_ood in [("id", id, False), *((n, s, True) for n, s in (ood or {}).items())]:
        told = None if progress is None else partial(progress, f"attention on {name}")
        view = look_at(lens, lenses, image_set, evenly(len(image_set), images), MapSettings(), told)
        for label in models:
            entry, summary = found[label], view.drift[label].summary()
            if is_ood:
                entry["attention"]["ood"][name] = summary
            else:
                entry["attention"]["id"] = summary
            for k in evenly(len(view), show):
                about = {"set": name, "ood": is_ood, "index": view.positions[k]}
                shown = example(view, label, k, lenses[label], is_ood=is_ood, thumbnail=lenses[label] is lens)
                entry["attention_examples"].append(about | shown)
    return found


def example(view: SetView, label: str, k: int, lens: Lens, *, is_ood: bool, thumbnail: bool) -> dict[str, Any]:
    """The k-th image of a view as a model sees it, ready for JSON: {grid, truth, label, class_name, probability,
    rollout, norms: {block: norms of patch tokens}}.

    The norms are those after the last block and after the one where the float model has most outlier tokens.
    thumbnail: a "thumbnail" too (base64 of a WebP file of at most 96 pixels) and "truth_name", of the float model.
    """
    images, index = view.images, view.positions[k]
    predicted = int(view.predicted[label][k])
    truth = None if images.labels is None or is_ood else int(images.labels[index])
    names = class_names(None if is_ood else images, lens.model)
    found: dict[str, Any] = {"grid": list(lens.layout.grid), "truth": truth, "class_name": name_of(names, predicted)}
    if thumbnail:
        found["truth_name"] = None if truth is None else name_of(names, truth)
        found["thumbnail"] = pictures.webp(pictures.thumbnail(photograph(images, index), THUMBNAIL), quality=75)
    return {
        **found,
        "label": predicted,
        "probability": round(float(view.confidence[label][k]), 4),
        "rollout": [round(v, 3) for v in view.maps[label][k].ravel().tolist()],
        "norms": {lens.blocks[b]: [_short(v) for v in view.norms[label][k, b].tolist()] for b in _telling_blocks(view)},
    }


def _telling_blocks(view: SetView) -> list[int]:
    """The last block, and the one with most outlier tokens in the float model, if it has any."""
    counts = view.outliers[FP32].sum(2).mean(0)
    return sorted({len(counts) - 1, *([int(counts.argmax())] if counts.max() > 0 else [])})


def _short(value: float) -> float:
    return float(f"{value:.4g}")
