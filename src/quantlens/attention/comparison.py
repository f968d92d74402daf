"""A float model and its quantized versions compared in what they look at, in one call."""

import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantlens.ambient import isolated
from quantlens.attention import picture_grids
from quantlens.attention.image_sets import FP32, SetView, evenly, look_at
from quantlens.attention.maps import MapSettings, check_kind
from quantlens.attention.picture_grids import ID
from quantlens.attention.recording import Lens
from quantlens.data import as_image_set
from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.files import write_whole
from quantlens.models import Model, model_for_tensors
from quantlens.qmodel import QuantizedModel, float_model

CHOICES = ("first", "most-changed")
Progress = Callable[[str, int, int], None]


@isolated
def compare(
    model: Model | torch.nn.Module,
    quantized: QuantizedModel | Iterable[QuantizedModel] | Mapping[str, QuantizedModel],
    images: Any,
    *,
    ood: Mapping[str, Any] | None = None,
    map: str | MapSettings = "rollout",
    target: int | None = None,
    discard: float = 0.9,
    fusion: str = "max",
    compat: str | None = None,
    limit: int = 64,
    cache_dir: Any = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> "AttentionResult":
    """Compare what a float model and quantized versions of it look at.

    quantized: one model, several, or label -> model. images, ood (name -> images): tensors [N, 3, H, W] prepared as the
    model wants them, ImageSets or SOURCEs; ``limit`` of each, evenly spaced, are measured. map: a kind, with target to
    compat as its settings, or :class:`~quantlens.attention.maps.MapSettings`. cache_dir, skip_bad: as for
    :func:`quantlens.data.as_image_set`. progress: called with (what, done, total).

    Where attention is not over all tokens (Swin), maps of a class alone are compared, and ``unavailable`` says why.
    Raises QuantlensError for wrong settings, UnsupportedError where the map needs attention over all tokens.

    >>> found = ql.attention.compare(model, {"W8A8": q8, "W4A4": q4}, "imagenet:val")  # doctest: +SKIP
    >>> found.sets["ID"].drift["W4A4"].rollout_spearman  # doctest: +SKIP
    """
    settings = map if isinstance(map, MapSettings) else MapSettings(map, target, discard, fusion, compat)
    sets = dict(ood or {})
    check_names(sets)
    if limit < 1:
        raise QuantlensError(f"limit {limit}: measure at least one image")
    models = labelled(quantized)
    if not isinstance(model, Model | QuantizedModel):
        shape = tuple(images.shape[1:]) if isinstance(images, torch.Tensor) and images.dim() == 4 else None
        model = model_for_tensors(model, shape)  # type: ignore[arg-type]
    reference = float_model(model)
    check_kind(settings.kind, reference)
    found = AttentionResult(reference, models, settings)
    lenses: dict[str, Any] = {FP32: reference, **models}
    try:
        lenses = {label: Lens(one) for label, one in lenses.items()}
        found.blocks = lenses[FP32].blocks
    except UnsupportedError as error:
        if "rollout" in settings.kind:
            raise
        found.unavailable = str(error)
    step: Progress = progress or (lambda what, done, total: None)
    reading: dict[str, Any] = {"cache_dir": cache_dir, "skip_bad": skip_bad}
    opened = {
        name: as_image_set(source, model.preprocess, name, progress=partial(step, f"decoding {name}"), **reading)
        for name, source in {ID: images, **sets}.items()
    }
    opened[ID] = opened[ID].in_classes_of(model.class_names)
    for name, one in opened.items():
        told = partial(step, f"attention on {name}")
        found.sets[name] = look_at(lenses, one, evenly(len(one), limit), settings, told)
    return found


def labelled(
    quantized: QuantizedModel | Iterable[QuantizedModel] | Mapping[str, QuantizedModel],
) -> dict[str, QuantizedModel]:
    """Quantized models by their labels, which are their bits unless given. Raises QuantlensError for none, for two of
    one label, and for what is no quantized model."""
    if isinstance(quantized, QuantizedModel):
        quantized = [quantized]
    if not isinstance(quantized, Iterable):
        quantized = {str(type(quantized).__name__): quantized}
    if not isinstance(quantized, Mapping):
        several = list(quantized)
        quantized = {str(getattr(m, "bits", "")): m for m in several}
        if len(quantized) < len(several):
            raise QuantlensError("two of the quantized models have the same bits; give {label: model}")
    if not quantized:
        raise QuantlensError("there is no quantized model to compare with")
    if FP32 in quantized:
        raise QuantlensError(f"{FP32} is what the float model is called; give the quantized one another label")
    for label, one in quantized.items():
        if not isinstance(one, QuantizedModel):
            raise QuantlensError(f"{label!r} is a {type(one).__name__}; give a model that quantlens.quantize returns")
    return {str(label): one for label, one in quantized.items()}


@dataclass
class AttentionResult:
    """What a float model and quantized versions of it look at.

    reference: the float model. models: label -> quantized model. sets: name ("ID" first) -> :class:`SetView` with maps,
    token norms, outliers and drift of every image. blocks: names of the blocks after which tokens were read.
    unavailable: why there are no norms and no drift of attention rows, or "".
    """

    reference: QuantizedModel
    models: dict[str, QuantizedModel]
    settings: MapSettings
    sets: dict[str, SetView] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)
    unavailable: str = ""

    @property
    def model(self) -> str:
        return self.reference.name

    @property
    def method(self) -> str:
        """The method, or the methods separated by commas."""
        return ", ".join(dict.fromkeys(m.method for m in self.models.values()))

    @property
    def labels(self) -> list[str]:
        """FP32 and the labels of the quantized models."""
        return [FP32, *self.models]

    def drift(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Mean drift of every model on every set: label -> set -> :meth:`SetView.summary`."""
        return {label: {name: view.summary(label) for name, view in self.sets.items()} for label in self.models}

    def per_image(self) -> list[dict[str, Any]]:
        """Drift of every image as rows for a DataFrame: {set, bits, image, …}."""
        return [
            {"set": name, "bits": label, **row}
            for name, view in self.sets.items()
            for label in self.models
            for row in view.per_image(label)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, ready for JSON; numbers that are not finite are None."""
        about = {
            "model": self.model,
            "checkpoint_sha256": self.reference.checkpoint_sha256,
            "method": self.method,
            "seed": next(iter(self.models.values())).seed,
            "map": asdict(self.settings),
            "images": {
                name: {"source": view.images.source, "fingerprint": view.images.fingerprint, "n": len(view)}
                for name, view in self.sets.items()
            },
            "unavailable": self.unavailable or None,
            "drift": self.drift(),
        }
        return json.loads(json.dumps(about), parse_constant=lambda constant: None)

    def arrays(self) -> dict[str, np.ndarray]:
        """What ``maps.npz`` holds: SET/positions, SET/LABEL/maps, and where available /norms and /outliers; predicted
        classes and their probabilities as /predicted and /confidence."""
        found = {f"{name}/positions": np.asarray(view.positions) for name, view in self.sets.items()}
        for name, view in self.sets.items():
            for kind in ("maps", "predicted", "confidence", "norms", "outliers"):
                found |= {f"{name}/{label}/{kind}": values for label, values in getattr(view, kind).items()}
        return found

    def save(self, folder: str | os.PathLike[str], *, show: int = 8, choose: str = "first") -> list[Path]:
        """Write maps.png, norms.png (where available), maps.npz and drift.json to a folder; the files written.

        show: images of each set in the pictures. choose: ``first``, or ``most-changed``: those whose maps correlate
        least with FP32's at the last model. Raises StorageError where a file cannot be written.
        """
        shown = {name: self.chosen(name, show, choose) for name in self.sets}
        about, npz = self.to_dict(), io.BytesIO()
        for name, places in shown.items():
            about["images"][name]["shown"] = [self.sets[name].positions[k] for k in places]
        np.savez_compressed(npz, **self.arrays())  # type: ignore[arg-type]
        files: dict[str, bytes | str] = {"maps.png": picture_grids.maps_picture(self, shown)}
        if not self.unavailable:
            files["norms.png"] = picture_grids.norms_picture(self, shown)
        files["maps.npz"] = npz.getvalue()
        files["drift.json"] = json.dumps(about, indent=1, allow_nan=False) + "\n"
        return [write_whole(Path(folder, name), content) for name, content in files.items()]

    def chosen(self, name: str, show: int, choose: str = "first") -> list[int]:
        """Images to show of a set, as places in its :class:`SetView`."""
        check_choice(choose)
        view = self.sets[name]
        if choose == "first":
            return list(range(min(show, len(view))))
        last = next(reversed(self.models))
        return np.argsort(view.correlation(last), kind="stable")[:show].tolist()


def check_names(ood: Iterable[str]) -> None:
    """Raises QuantlensError for an OOD set that is called ID or has no name."""
    if not all(ood):
        raise QuantlensError("an OOD set has no name; give {name: images}")
    if ID in ood:
        raise QuantlensError(f"{ID!r} is the name of the in-distribution images; call the OOD set otherwise")


def check_choice(choose: str) -> None:
    """Raises UnknownNameError unless ``choose`` is one of :data:`CHOICES`."""
    if choose not in CHOICES:
        raise UnknownNameError("choice of images", choose, CHOICES)
