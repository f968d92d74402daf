"""Channel equalisation: factors per channel that move range from activations into weights, exactly.

* LayerNorm → linear layers: LN(x)/s − t, W·diag(s), bias + W·diag(s)·t (:func:`quantlens.transforms.rescale_norm`).
  Factors: :func:`smooth_factors` (SmoothQuant, Xiao et al., ICML 2023, eq. 4) or :func:`balance` (ranges brought
  towards each other and centred, as RepQ-ViT's section 3.2 does with scales and zero points).
* v → proj: :func:`quantlens.transforms.heads.rescale_values`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlens.errors import QuantlensError
from quantlens.graph import Graph
from quantlens.transforms.norms import NormGroup, rescale_norm


@dataclass(frozen=True)
class Factors:
    """float32 [C] each: the activation becomes x/scale − shift. scale > 0."""

    scale: Tensor
    shift: Tensor


def smooth_factors(activation: Tensor, weight: Tensor, strength: float = 0.5) -> Tensor:
    """s_c = max|x_c|^m / max|W_:,c|^(1 − m), brought to a geometric mean of 1 (SmoothQuant eq. 4; m = ``strength``).

    activation, weight: [C] largest magnitudes. A channel where either is 0 or not finite keeps 1.
    """
    activation, weight = activation.double(), weight.double()
    alive = _alive(activation) & _alive(weight)
    log = strength * activation.clamp_min(1e-300).log() - (1 - strength) * weight.clamp_min(1e-300).log()
    return _centred_exp(log, alive)


def balance(low: Tensor, high: Tensor, strength: float = 1.0, *, shift: bool = True) -> Factors:
    """Ranges [low_c, high_c] brought towards one size: s_c = (half-range_c)^m over its geometric mean, m =
    ``strength`` (1: all equal, 0: as they were).

    shift: also move every channel's middle to 0 (t_c = middle_c/s_c), as RepQ-ViT does with zero points; half-range
    is then (high − low)/2, else max|x_c|. A constant channel keeps s = 1 and, shifted, becomes exactly 0.
    """
    low, high = low.double(), high.double()
    size = (high - low) / 2 if shift else torch.maximum(low.abs(), high.abs())
    alive = size > 1e-6 * torch.maximum(low.abs(), high.abs()).max().clamp_min(1e-30)
    scale = _centred_exp(strength * size.clamp_min(1e-300).log(), alive)
    middle = (low + high) / 2 if shift else torch.zeros_like(low)
    return Factors(scale, (middle / scale.double()).float())


def _alive(size: Tensor) -> Tensor:
    return torch.isfinite(size) & (size > 1e-12 * size.nan_to_num(0, 0, 0).max().clamp_min(1e-30))


def _centred_exp(log: Tensor, alive: Tensor) -> Tensor:
    """exp of ``log`` less its mean over the living channels, within 2⁻²⁰ … 2²⁰; 1 for the others."""
    if not bool(alive.any()):
        return torch.ones_like(log).float()
    centred = (log - log[alive].mean()).clamp(-20 * 0.6931, 20 * 0.6931)
    return torch.where(alive, centred.exp(), torch.ones_like(log)).float()


def columns(graph: Graph, group: NormGroup) -> Tensor:
    """[C] largest magnitude of every column of the linear layers after a LayerNorm."""
    weights = [graph.tensor(str(linear.weight)).abs().amax(0) for linear in group.linears]
    return torch.stack(weights).amax(0)


def equalise_norms(graph: Graph, groups: list[NormGroup], factors: Mapping[str, Factors]) -> list[str]:
    """Apply factors (by the LayerNorm's site name) exactly; returns the names of the norms changed.

    Raises QuantlensError for factors that are not positive and finite or do not fit.
    """
    done = []
    for group in groups:
        chosen = factors.get(group.norm.name)
        if chosen is None:
            continue
        channels, scale, shift = graph.tensor(group.parameters[0]).shape, chosen.scale, chosen.shift
        fits = scale.shape == shift.shape == channels
        if not fits or not bool(((scale > 0) & scale.isfinite() & shift.isfinite()).all()):
            raise QuantlensError(
                f"{group.norm.name}: equalisation needs {tuple(channels)} positive finite factors and finite shifts"
            )
        rescale_norm(graph, group, scale, shift)
        done.append(group.norm.name)
    return done
