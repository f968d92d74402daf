"""Maps of any kind from any model, float or quantized (gradients pass quantizers straight through).

* Rollout: :mod:`quantlens.attention.rollout`.
* Grad-CAM (Selvaraju et al., ICCV 2017, eq. 1–2): channels of a layer's tokens, weighted by the mean gradient of the
  class's logit over the patches, summed, negatives set to 0.
* HiResCAM (Draelos and Carin, 2020, eq. 4): gradient times activation at each patch, summed over channels.
* Gradient rollout: rollout of max(mean over heads of gradient∘attention, 0) (Chefer et al., CVPR 2021, eq. 5, with the
  product in place of their relevance rule; vit-explain's ``grad_rollout``).

Maps are not stretched to [0, 1] per image: between precisions, the size of a map is information.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlens.ambient import isolated
from quantlens.attention.recording import (
    Lens,
    check_task,
    class_logits,
    has_classes,
    layout_of,
    lens_of,
    probabilities as probabilities_of,
)
from quantlens.attention.rollout import check_settings, rollout
from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.qmodel import QuantizedModel, float_model, simulate

ACTIVATION_MAPS = ("grad-cam", "hires-cam")
MAPS = ("rollout", *ACTIVATION_MAPS, "gradient-rollout")


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
        if self.target is not None and not 0 <= self.target < 2**31:
            raise QuantlensError(f"class {self.target} does not exist; give its number, from 0")
        check_settings(self.discard, self.fusion, self.compat)

    @property
    def rollout(self) -> dict[str, Any]:
        """The settings that the rollout of this kind takes; none for other maps."""
        taken = {"rollout": ("discard", "fusion", "compat"), "gradient-rollout": ("discard", "compat")}
        return {name: getattr(self, name) for name in taken.get(self.kind, ())}

    def caption(self) -> str:
        """The settings in words."""
        words = [self.kind]
        if self.kind == "rollout":
            words.append(f"heads fused by their {'mean' if self.fusion == 'mean' else self.fusion + 'imum'}")
        if self.rollout:
            words.append(f"smallest {100 * self.discard:.4g} % discarded")
            words += [f"as {self.compat}"] if self.compat else []
        if self.kind != "rollout":
            words.append("class predicted by FP32" if self.target is None else f"class {self.target}")
        return ", ".join(words)


def maps_of(
    model: Any, images: Tensor, kind: str = "rollout", *, target: Tensor | int | None = None, **settings: Any
) -> tuple[np.ndarray, Tensor]:
    """(maps float32 [B, rows, columns], class probabilities [B, K]) of a batch of images.

    model: float or quantized, or a Lens. kind: one of :data:`MAPS`. target: the class whose map it is (not for rollout,
    which knows no class). settings: of the two rollouts.
    """
    if kind not in MAPS:
        raise UnknownNameError("map", kind, MAPS)
    plain = model.model if isinstance(model, Lens) else float_model(model)
    check_kind(kind, plain)
    with torch.no_grad():
        probabilities = probabilities_of(plain, class_logits(plain.outputs(images).logits))
    if kind in ACTIVATION_MAPS:
        return class_activation(plain, images, target=target, kind=kind).cpu().numpy(), probabilities
    lens = lens_of(model)
    if kind == "rollout":
        values = lens.rollout(images, **settings)
    else:
        values = gradient_rollout(lens, images, target=target, **settings)
    return values.unflatten(1, lens.layout.grid).cpu().numpy(), probabilities


def check_kind(kind: str, model: Any) -> None:
    """Raises UnsupportedError for a map that needs classes, which the model does not have, and for a detector."""
    check_task(model)
    if kind != "rollout" and not has_classes(model):
        raise UnsupportedError(
            f"{model.name} has the task {model.task!r}: there is no class whose {kind} map could be drawn; take rollout"
        )


def default_layer(model: Any) -> str:
    """The edge that class activation maps look at: the LayerNorm in front of the last block's attention, whose output
    still has patches that matter to the class (after it only the class token does)."""
    sites = float_model(model).graph.sites
    for site in sites.of_kind("layer_norm"):
        if sites.blocks and site.block == sites.blocks[-1].name:
            return f"{site.name}.output"
    raise QuantlensError("the model has no transformer block with a LayerNorm: name the layer to look at (a site)")


@isolated
def class_activation(
    model: Any, images: Tensor, *, target: int | Tensor | None = None, layer: str | None = None, kind: str = "grad-cam"
) -> Tensor:
    """Grad-CAM or HiResCAM maps, float32 [B, rows, columns], ≥ 0.

    model: float or quantized. images: [B, 3, H, W]. target: class index, one per image [B], or None for the predicted
    one. layer: an activation edge (``blocks.11.norm1.output``) or a site's name; its tokens are [B, N, C] with class
    and register tokens first, or [B, rows, columns, C]. kind: ``grad-cam`` or ``hires-cam``.
    """
    if kind not in ACTIVATION_MAPS:
        raise UnknownNameError("class activation map", kind, ACTIVATION_MAPS)
    qmodel: QuantizedModel = float_model(model)
    edges = qmodel.graph.sites.edges
    layer = layer or default_layer(qmodel)
    key = layer if layer in edges else f"{layer}.output"
    if key not in edges:
        raise UnknownNameError("layer", layer, [e for e in edges if e.endswith(".output")])
    module = simulate(qmodel.graph, qmodel.plan.quantizers, qmodel.plan.operators, [key])
    with torch.enable_grad():
        logits, _, (tokens,) = module(images.detach().clone().requires_grad_(True))
        (gradient,) = torch.autograd.grad(_chosen(class_logits(logits), target).sum(), tokens)
    tokens, gradient = _on_grid(qmodel, tokens.detach()), _on_grid(qmodel, gradient)
    weights = gradient.mean((1, 2), keepdim=True) if kind == "grad-cam" else gradient
    return (weights * tokens).sum(-1).clamp_min(0)


@isolated
def gradient_rollout(
    model: Any, images: Tensor, *, target: int | Tensor | None = None, discard: float = 0.9, compat: str | None = None
) -> Tensor:
    """Attention-weighted gradient rollout [B, P] for a class (None: the predicted one)."""
    lens = lens_of(model)
    with torch.enable_grad():
        view = lens(images.detach().clone().requires_grad_(True))
        gradients = torch.autograd.grad(_chosen(view.logits, target).sum(), view.probs)
    relevance = [(p.detach() * g).mean(dim=1).clamp_min(0) for p, g in zip(view.probs, gradients, strict=True)]
    return rollout(relevance, discard=discard, prefix=lens.layout.prefix, compat=compat)


def _chosen(logits: Tensor, target: int | Tensor | None) -> Tensor:
    """The logit of each image's target class: [B]."""
    if target is None:
        return logits.amax(dim=1)
    index = torch.as_tensor(target, device=logits.device).expand(len(logits)).long()
    if not 0 <= int(index.min()) <= int(index.max()) < logits.shape[1]:
        raise QuantlensError(f"class {int(index.max())} does not exist: the model has {logits.shape[1]}")
    return logits.gather(1, index[:, None])[:, 0]


def _on_grid(qmodel: QuantizedModel, tokens: Tensor) -> Tensor:
    """Tokens as [B, rows, columns, C]: class and register tokens left out."""
    if tokens.dim() == 4:
        return tokens
    layout = layout_of(qmodel.graph)
    if tokens.dim() != 3 or tokens.shape[1] != layout.prefix + prod(layout.grid):
        raise QuantlensError(f"the layer's values have shape {list(tokens.shape)}, which are no tokens of the patches")
    return tokens[:, layout.prefix :].unflatten(1, layout.grid)
