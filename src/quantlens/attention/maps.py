"""Maps of any kind from any model, and how far two models' maps are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlens.attention import drift
from quantlens.attention.gradients import class_activation, gradient_rollout
from quantlens.attention.measure import TOP
from quantlens.attention.recording import Lens
from quantlens.attention.rollout import check_settings
from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.qmodel import float_model

MAPS = ("rollout", "grad-cam", "hires-cam", "gradient-rollout")


@dataclass(frozen=True)
class MapSettings:
    """Which map, and its settings: discard, fusion and compat of the two rollouts
    (:func:`~quantlens.attention.rollout.rollout`); target, the class of gradient maps (None: the float model's
    prediction of each image). Raises QuantlensError for settings that do not exist."""

    kind: str = "rollout"
    target: int | None = None
    discard: float = 0.9
    fusion: str = "max"
    compat: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in MAPS:
            raise UnknownNameError("map", self.kind, MAPS)
        check_settings(self.discard, self.fusion, self.compat)

    @property
    def rollout(self) -> dict[str, Any]:
        """The settings that the rollout of this kind takes; none for other maps."""
        if "rollout" not in self.kind:
            return {}
        fusion = {"fusion": self.fusion} if self.kind == "rollout" else {}
        return {"discard": self.discard, **fusion, "compat": self.compat}

    def caption(self) -> str:
        """The settings in words."""
        words = [self.kind]
        if self.kind == "rollout":
            words.append(f"heads fused by their {'mean' if self.fusion == 'mean' else self.fusion + 'imum'}")
        if "rollout" in self.kind:
            words.append(f"smallest {100 * self.discard:.4g} % discarded")
            words += [f"as {self.compat}"] if self.compat else []
        if self.kind != "rollout":
            words.append("class predicted by FP32" if self.target is None else f"class {self.target}")
        return ", ".join(words)

    def to_dict(self) -> dict[str, Any]:
        fusion = {} if self.kind == "gradient-rollout" else {"fusion": self.fusion}
        return {"kind": self.kind, "target": self.target, "discard": self.discard, **fusion, "compat": self.compat}


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
        values = gradient_rollout(lens, images, target=target, discard=discard, compat=compat)
        return _shaped(values, lens), probabilities
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
