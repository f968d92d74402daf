"""Looking at whole sets: drift of every model from the float one, and some images with their maps to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlens.attention import drift, pictures
from quantlens.attention.gradients import class_activation, gradient_rollout
from quantlens.attention.lens import Lens
from quantlens.attention.measure import TOP, Drift, Seen, measure
from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.qmodel import float_model

MAPS = ("rollout", "grad-cam", "hires-cam", "gradient-rollout")
BATCH = 64
THUMBNAIL = 96

Progress = Callable[[str, int, int], None]


def evenly(count: int, wanted: int) -> list[int]:
    """``wanted`` evenly spaced positions among ``count`` (all, where there are fewer), the first among them."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def chosen(images: Any, positions: list[int]) -> Tensor:
    """Some images of an :class:`~quantlens.data.ImageSet`, ready for the model: float32 [n, 3, H, W]."""
    if images.values is not None:
        return images.values[positions]
    return images.preprocess.normalize(np.ascontiguousarray(images.pixels[positions]))


def photograph(images: Any, position: int) -> Any:
    """One image of a set as a PIL image."""
    if images.pixels is not None:
        return pictures.picture(images.pixels[position])
    return pictures.picture(images.values[position].numpy(), images.preprocess)


def drifts(
    reference: Any,
    models: Mapping[str, Any],
    images: Any,
    positions: list[int],
    *,
    progress: Callable[[int], None] | None = None,
    keep: Callable[[str, int, Seen], None] | None = None,
    **rollout: Any,
) -> dict[str, Drift]:
    """:func:`~quantlens.attention.measure.measure` on some images of a set, on the device that the models are on."""
    device = (reference if isinstance(reference, Lens) else Lens(reference)).model.device
    parts = (positions[i : i + BATCH] for i in range(0, len(positions), BATCH))
    batches = (chosen(images, part).to(device) for part in parts)
    return measure(reference, models, batches, progress=progress, keep=keep, **rollout)


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

    "attention" is {"id": summary, "ood": {name: summary}} (:meth:`Drift.summary`); "attention_examples" a list of {set,
    ood, index, truth, label, class_name, probability, grid, rollout, norms: {block: norms of patch tokens}}: the norms
    behind the last block and behind the one where the float model has most outlier tokens. Examples of the float model
    itself hold a "thumbnail" too (base64 of a WebP file of at most 96 pixels).
    Raises UnsupportedError for models without global attention.
    """
    lens = reference if isinstance(reference, Lens) else Lens(reference)
    lenses = {label: lens if float_model(m) is lens.model else Lens(m) for label, m in models.items()}
    found: dict[str, dict[str, Any]] = {
        label: {"attention": {"id": None, "ood": {}}, "attention_examples": []} for label in models
    }
    for name, image_set, is_ood in [("id", id, False), *((n, s, True) for n, s in (ood or {}).items())]:
        positions = evenly(len(image_set), images)
        shown = evenly(len(positions), show)
        kept: dict[str, list[dict[str, Any]]] = {label: [] for label in models}

        def keep(
            label: str,
            start: int,
            seen: Seen,
            shown: list[int] = shown,
            kept: dict[str, list[dict[str, Any]]] = kept,
        ) -> None:
            for row in (k - start for k in shown if start <= k < start + len(seen.map)):
                kept[label].append(
                    {
                        "label": int(seen.predicted[row]),
                        "probability": round(float(seen.confidence[row]), 4),
                        "rollout": [round(v, 3) for v in seen.map[row].tolist()],
                        "norms": seen.norms[row].cpu().numpy(),
                    }
                )

        def told(done: int, name: str = name, total: int = len(positions)) -> None:
            if progress is not None:
                progress(f"attention on {name}", done, total)

        measured = drifts(lens, lenses, image_set, positions, progress=told, keep=keep)
        for label, drift_of in measured.items():
            entry, summary = found[label], drift_of.summary()
            if is_ood:
                entry["attention"]["ood"][name] = summary
            else:
                entry["attention"]["id"] = summary
            counts = drift_of.outliers_reference.mean(0)
            blocks = {len(lens.blocks) - 1}
            if counts.max() > 0:
                blocks.add(int(counts.argmax()))
            for k, example in zip(shown, kept[label], strict=True):
                index = positions[k]
                example["norms"] = {
                    lens.blocks[b]: [_short(v) for v in example["norms"][b].tolist()] for b in sorted(blocks)
                }
                about: dict[str, Any] = {"set": name, "ood": is_ood, "index": index, "grid": list(lens.layout.grid)}
                truth = None if image_set.labels is None or is_ood else int(image_set.labels[index])
                names = class_names(None if is_ood else image_set, lens.model)
                about["truth"], about["class_name"] = truth, name_of(names, example["label"])
                if lenses[label] is lens:
                    about["truth_name"] = None if truth is None else name_of(names, truth)
                    about["thumbnail"] = pictures.webp(
                        pictures.thumbnail(photograph(image_set, index), THUMBNAIL), quality=75
                    )
                entry["attention_examples"].append({**about, **example})
    return found


def class_names(images: Any, model: Any) -> list[str] | None:
    """Names of a model's classes: its own, those of its images, or ImageNet's for a thousand classes; None if nobody
    knows them."""
    count = int(model.num_classes)
    for holder in (model, images):
        names = getattr(holder, "class_names", None)
        if names is not None and len(names) == count and not all(_is_code(n) for n in names):
            return [str(n) for n in names]
    if count == 1000:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return [info.index_to_description(i) for i in range(count)]
    return None


def name_of(names: list[str] | None, index: int) -> str | None:
    """The first of a class's names: "tench" of "tench, Tinca tinca"."""
    return None if names is None else names[index].split(",")[0]


def _is_code(name: Any) -> bool:
    """Whether a name is a WordNet number, which says nothing to a reader."""
    text = str(name)
    return len(text) == 9 and text[0] == "n" and text[1:].isdigit()


def _short(value: float) -> float:
    return float(f"{value:.4g}")


# -- maps of any kind --------------------------------------------------------------------------------------------------
def maps_of(
    model: Any,
    images: Tensor,
    kind: str = "rollout",
    *,
    target: Tensor | int | None = None,
    discard: float = 0.9,
    fusion: str = "max",
    compat: str | None = None,
) -> tuple[np.ndarray, Tensor]:
    """(maps float32 [B, rows, columns], class probabilities [B, K]) of a batch of images.

    model: float or quantized, or a Lens. kind: one of :data:`MAPS`. target: the class whose map it is (not for rollout,
    which knows no class). discard, fusion, compat: of the two rollouts.
    """
    if kind not in MAPS:
        raise UnknownNameError("map", kind, MAPS)
    if kind == "rollout":
        lens = model if isinstance(model, Lens) else Lens(model)
        with torch.no_grad():
            view = lens(images)
            values = lens.rollout_of(view, discard=discard, fusion=fusion, compat=compat)
        return _shaped(values, lens), view.logits.softmax(1)
    run = model.model if isinstance(model, Lens) else float_model(model)
    with torch.no_grad():
        probabilities = run(images).softmax(1)
    if kind == "gradient-rollout":
        lens = model if isinstance(model, Lens) else Lens(model)
        return _shaped(gradient_rollout(lens, images, target=target, discard=discard, compat=compat), lens), (
            probabilities
        )
    return class_activation(run, images, target=target, kind=kind).cpu().numpy(), probabilities


def _shaped(values: Tensor, lens: Lens) -> np.ndarray:
    return values.detach().unflatten(1, lens.layout.grid).cpu().numpy()


def map_drift(reference: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    """Of maps [n, rows, columns] twice: "spearman", "overlap" (of the :data:`TOP` largest) and "movement", each [n]."""
    if reference.shape != other.shape:
        raise QuantlensError("the two models' maps have different sizes; drift compares one model's precisions")
    grid = (reference.shape[1], reference.shape[2])
    a, b = (torch.from_numpy(m).flatten(1) for m in (reference, other))
    return {
        "spearman": drift.spearman(a, b).numpy(),
        "overlap": drift.top_overlap(a, b, max(1, round(TOP * a.shape[1]))).numpy(),
        "movement": drift.movement(a, b, grid).numpy(),
    }
