"""Maps that need gradients: Grad-CAM, HiResCAM and attention-weighted gradient rollout, of float and quantized models
(gradients pass quantizers straight through).

* Grad-CAM (Selvaraju et al., ICCV 2017, eq. 1–2): channels of a layer's tokens, weighted by the mean gradient of the
  class's logit over the patches, summed, negatives set to 0.
* HiResCAM (Draelos and Carin, 2020, eq. 4): gradient times activation at each patch, summed over channels.
* Gradient rollout: rollout of max(mean over heads of gradient∘attention, 0) (Chefer et al., CVPR 2021, eq. 5, with the
  product in place of their relevance rule; vit-explain's ``grad_rollout``).

Maps are not stretched to [0, 1] per image unless asked: between precisions, the size of a map is information.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlens.ambient import isolated
from quantlens.attention.recording import Lens
from quantlens.attention.rollout import rollout
from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.qmodel import QuantizedModel, float_model, simulate

KINDS = ("grad-cam", "hires-cam")


def default_layer(model: Any) -> str:
    """The edge that class activation maps look at: the LayerNorm in front of the last block's attention, whose output
    still has patches that matter to the class (after it only the class token does)."""
    graph = float_model(model).graph
    if not graph.sites.blocks:
        raise QuantlensError("the model has no transformer block: name the layer to look at")
    last = graph.sites.blocks[-1]
    for site in graph.sites.of_kind("layer_norm"):
        if site.block == last.name:
            return f"{site.name}.output"
    raise QuantlensError(f"{last.name} has no LayerNorm: name the layer to look at (a site of the graph)")


@isolated
def class_activation(
    model: Any, images: Tensor, *, target: int | Tensor | None = None, layer: str | None = None, kind: str = "grad-cam"
) -> Tensor:
    """Grad-CAM or HiResCAM maps, float32 [B, rows, columns], ≥ 0.

    model: float or quantized. images: [B, 3, H, W]. target: class index, one per image [B], or None for the predicted
    one. layer: an activation edge (``blocks.11.norm1.output``) or a site's name; its tokens are [B, N, C] with class
    and register tokens first, or [B, rows, columns, C]. kind: ``grad-cam`` or ``hires-cam``.
    """
    if kind not in KINDS:
        raise UnknownNameError("class activation map", kind, KINDS)
    qmodel: QuantizedModel = float_model(model)
    edges = qmodel.graph.sites.edges
    layer = layer or default_layer(qmodel)
    key = layer if layer in edges else f"{layer}.output"
    if key not in edges:
        raise UnknownNameError("layer", layer, [e for e in edges if e.endswith(".output")])
    module = simulate(qmodel.graph, qmodel.plan.quantizers, qmodel.plan.operators, [key])
    with torch.enable_grad():
        logits, _, (tokens,) = module(images.detach().clone().requires_grad_(True))
        (gradient,) = torch.autograd.grad(_chosen(logits, target).sum(), tokens)
    tokens, gradient = _on_grid(qmodel, tokens.detach()), _on_grid(qmodel, gradient)
    weights = gradient.mean((1, 2), keepdim=True) if kind == "grad-cam" else gradient
    return (weights * tokens).sum(-1).clamp_min(0)


@isolated
def gradient_rollout(
    model: Any, images: Tensor, *, target: int | Tensor | None = None, discard: float = 0.9, compat: str | None = None
) -> Tensor:
    """Attention-weighted gradient rollout [B, P] for a class (None: the predicted one)."""
    lens = model if isinstance(model, Lens) else Lens(model)
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
    if bool((index < 0).any()) or bool((index >= logits.shape[1]).any()):
        raise QuantlensError(f"class {int(index.max())} does not exist: the model has {logits.shape[1]}")
    return logits.gather(1, index[:, None])[:, 0]


def _on_grid(qmodel: QuantizedModel, tokens: Tensor) -> Tensor:
    """Tokens as [B, rows, columns, C]: class and register tokens left out."""
    if tokens.dim() == 4:
        return tokens
    from quantlens.attention.recording import layout_of

    layout = layout_of(qmodel.graph)
    if tokens.dim() != 3 or tokens.shape[1] != layout.prefix + layout.patches:
        raise QuantlensError(f"the layer's values have shape {list(tokens.shape)}, which are no tokens of the patches")
    return tokens[:, layout.prefix :].unflatten(1, layout.grid)
