"""What an evaluation found, as a dataclass and as plain data that is valid JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlens.errors import QuantlensError
from quantlens.files import write_whole

if TYPE_CHECKING:
    from quantlens.evaluation.outputs import Outputs

ID_FIGURES = ("top1", "top5", "nll", "ece", "ece_adaptive", "brier")
OOD_FIGURES = ("aupr_out", "aupr_in", "auroc", "fpr95_id", "fpr95_ood")
NOT_STORED = frozenset({"extra", "outputs"})
"""Fields of a Result that are no keys of its dictionary."""


@dataclass
class Result:
    """Everything measured on one model; all rates are fractions. `to_dict()` is the stable form (see the README)."""

    model: str
    checkpoint_sha256: str | None
    method: str
    bits: str
    seed: int
    size_mb: float | None
    size_ratio: float | None
    num_parameters: int | None
    options: dict[str, Any]
    calibration: dict[str, Any] | None
    preprocess: dict[str, Any] | None
    environment: dict[str, Any]
    id: dict[str, Any]
    fit: dict[str, Any] | None = None
    ood: dict[str, dict[str, Any]] = field(default_factory=dict)
    ood_mean: dict[str, dict[str, Any]] = field(default_factory=dict)
    histograms: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores_unavailable: dict[str, str] = field(default_factory=dict)
    fp32: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None
    guard: dict[str, Any] | None = None
    """How often the OOD threshold of an exported file is right (`export.threshold.guard_figures`); None without one."""
    seconds: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of a newer quantlens, kept as they are."""
    outputs: Outputs | None = field(default=None, repr=False, compare=False)
    """What the model gave on every image, where it was asked for; no part of `to_dict()`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data that is valid JSON: numbers are Python's, and a metric that is not finite is null."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in NOT_STORED]
        return plain({**self.extra, **{name: getattr(self, name) for name in names}})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """The inverse of `to_dict`. Raises QuantlensError when a key that every result has is missing."""
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in NOT_STORED}
        known = {k: v for k, v in data.items() if k in fields}
        try:
            return cls(**known, extra={k: v for k, v in data.items() if k not in fields})
        except TypeError as error:
            missing = sorted(
                name
                for name, f in fields.items()
                if name not in known and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            )
            raise QuantlensError(f"this is no result of quantlens: it lacks {', '.join(missing) or error}") from None

    def compare(self, reference: Result) -> None:
        """Set `fp32` and `delta` from the FP32 Result on the same images. Raises QuantlensError for one of other
        images, or of a quantized model."""
        check_same_images(reference, self.id, self.ood)
        self.set_reference(reference.to_dict())

    def set_reference(self, reference: Mapping[str, Any]) -> None:
        """Set `fp32` and `delta` from the parts "id", "ood" and "ood_mean" of the FP32 model's result."""
        from quantlens.metrics import delta

        own = {"id": self.id, "ood": self.ood, "ood_mean": self.ood_mean}
        self.fp32 = figures_only(reference)
        self.delta = delta(self.fp32, figures_only(own))

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` as JSON; the file is there whole or not at all."""
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def __str__(self) -> str:
        """What was measured and on what, in a few lines; the tables are `quantlens evaluate`'s."""
        return "\n".join(summary(self))


def summary(result: Result) -> list[str]:
    """A line for the model, one for the ID images, and one for each OOD set."""
    quantized = result.method != "fp32"
    name = f"{result.model} {result.method} {result.bits}, seed {result.seed}" if quantized else f"{result.model} FP32"
    size = "" if result.size_mb is None else f", {result.size_mb:.2f} MB"
    ratio = f" ({result.size_ratio:.3f} of FP32)" if quantized and result.size_ratio is not None else ""
    skipped = f", {result.id['skipped']} skipped" if result.id.get("skipped") else ""
    return [f"{name}{size}{ratio}", f"ID {result.id.get('source')}: {result.id.get('n')} images{skipped}"]


def figures_only(result: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that a quantization delta is taken of: {"id", "ood", "ood_mean"}, no counts, no tables."""

    def chosen(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {figure: entry[figure] for figure in OOD_FIGURES if figure in entry}

    def by_score(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {score: chosen(value) for score, value in entry.items() if isinstance(value, Mapping)}

    return {
        "id": {figure: result["id"][figure] for figure in ID_FIGURES if figure in result["id"]},
        "ood": {name: by_score(entry) for name, entry in result["ood"].items()},
        "ood_mean": {group: by_score(entry) for group, entry in result["ood_mean"].items()},
    }


def check_same_images(reference: Result, id_part: Mapping[str, Any], ood_part: Mapping[str, Any]) -> None:
    """Raise QuantlensError unless a reference Result is of the FP32 model, and of the images that `images.describe`
    describes here: those of the ID set, and of every OOD set by name."""
    if reference.method != "fp32":
        raise QuantlensError(
            f"the reference is a result of {reference.method} at {reference.bits}; give the result of the FP32 model"
        )
    if reference.id.get("fingerprint") != id_part.get("fingerprint"):
        raise QuantlensError(
            f"the reference was measured on other ID images ({reference.id.get('source')}) than "
            f"{id_part.get('source')}; measure the FP32 model on the same images"
        )
    for name, part in ood_part.items():
        if reference.ood.get(name, {}).get("fingerprint") != part.get("fingerprint"):
            raise QuantlensError(
                f"the reference was not measured on the images of OOD set {name} ({part.get('source')}); measure the "
                "FP32 model on the same images"
            )


def plain(value: Any) -> Any:
    """Nested dicts, lists, strings and finite Python numbers; numpy values are unpacked, NaN becomes None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
