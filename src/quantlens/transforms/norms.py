"""LayerNorms and the linear layers that read them: finding them, moving scales and shifts between the two, and the
factors that even out the channels.

:func:`find_norm_groups` finds each LayerNorm whose output is read by linear layers alone, through any operations that
keep the channels last (Swin's shifted windows, the choice of the class token); no list of module names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.errors import QuantlensError
from quantlens.graph import Graph, Site, argument, op_name, walk
from quantlens.transforms.layers import add_to_bias, alone, change_input

RESHAPES = (
    "aten.reshape.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.clone.default",
    "aten.contiguous.default",
)
"""Operations that keep the order of the elements."""


@dataclass(frozen=True)
class NormGroup:
    """A LayerNorm site and all the linear sites that read its output."""

    norm: Site
    linears: tuple[Site, ...]

    @property
    def parameters(self) -> tuple[str, str]:
        """Names of the LayerNorm's scale γ and shift β."""
        gamma, beta = self.norm.node.args[2:4]
        return str(gamma.target), str(beta.target)  # type: ignore[union-attr]


def find_norm_groups(graph: Graph) -> list[NormGroup]:
    """LayerNorms (with scale and shift over the last dimension only) that feed linear layers and nothing else, none of
    them with parameters that something else reads."""
    by_node, groups = graph.sites.by_node, []
    for norm in graph.sites.of_kind("layer_norm"):
        shape, *parameters = norm.node.args[1:4]
        if len(shape) != 1 or len(parameters) < 2 or any(graph.constant(p) is None for p in parameters):
            continue
        passed_on = walk([norm.node], lambda value: [u for u in value.users if keeps_channels_last(u, value)])
        readers = [(u, value) for value in passed_on for u in value.users if not keeps_channels_last(u, value)]
        if readers and all(op_name(u) == "aten.linear.default" and u.args[0] is v and u in by_node for u, v in readers):
            groups.append(NormGroup(norm, tuple(by_node[u] for u, _ in readers)))
    return [group for group in groups if all(alone(graph, site) for site in (group.norm, *group.linears))]


def keeps_channels_last(node: fx.Node, value: fx.Node) -> bool:
    """Whether ``node`` only moves tokens of ``value``: the last dimension stays last and whole."""
    before, after = value.meta.get("shape"), node.meta.get("shape")
    if not before or not after or before[-1] is None or before[-1] != after[-1]:
        return False
    op, last = op_name(node), len(before) - 1
    if op == "aten.unsqueeze.default":
        return node.args[1] % (last + 2) != last + 1  # type: ignore[operator]
    if op == "aten.permute.default":
        return node.args[1][-1] % (last + 1) == last  # type: ignore[index, operator]
    if op == "aten.transpose.int":
        touched: Any = node.args[1:3]
    elif op in ("aten.select.int", "aten.slice.Tensor"):
        touched = [argument(node, "dim")]
    elif op == "aten.roll.default":
        touched = argument(node, "dims") or [last]
    else:  # a last dimension that keeps its size in a reshape stays last: the elements keep their order
        return op in RESHAPES
    return all(dim % (last + 1) != last for dim in touched)


def rescale_norm(graph: Graph, group: NormGroup, scale: Tensor, shift: Tensor) -> None:
    """Make the LayerNorm put out ``LN(x)/scale − shift`` and the linears undo it exactly.

    scale, shift: [C], scale > 0. With W [out, C]: W ← W·diag(scale), bias ← bias + W_new·shift; a missing bias is made.
    The edges, sites and names of the graph stay as they are.
    """
    gamma, beta = group.parameters
    scale, shift = (t.to(graph.tensor(gamma).device, torch.float64) for t in (scale, shift))
    for linear in group.linears:
        add_to_bias(graph, linear, (graph.tensor(str(linear.weight)).double() * scale) @ shift)
        change_input(graph, linear, lambda weight: weight * scale, scale * shift)
    graph.change(gamma, lambda value: value / scale)
    graph.change(beta, lambda value: value / scale - shift)


def fold_norm(graph: Graph, group: NormGroup) -> None:
    """Move a LayerNorm's scale γ and shift β into its linears: W ← W·diag(γ), bias ← bias + W_old·β; then γ = 1, β = 0.

    Channels with γ = 0 are exact too: their weights become 0 and β reaches the bias.
    """
    gamma, beta = (graph.tensor(name).double() for name in group.parameters)
    for linear in group.linears:
        add_to_bias(graph, linear, graph.tensor(str(linear.weight)).double() @ beta)
        change_input(graph, linear, lambda weight: weight * gamma, beta)
    for name, new in zip(group.parameters, (torch.ones_like, torch.zeros_like), strict=True):
        graph.change(name, new)


# -- equalisation --------------------------------------------------------------------------------------------------
# Channel equalisation: factors per channel that move range from activations into weights, exactly.
#
# * LayerNorm → linear layers: LN(x)/s − t, W·diag(s), bias + W·diag(s)·t (:func:`quantlens.transforms.rescale_norm`).
#   Factors: :func:`smooth_factors` (SmoothQuant, Xiao et al., ICML 2023, eq. 4) or :func:`balance` (ranges brought
#   towards each other and centred, as RepQ-ViT's section 3.2 does with scales and zero points).
# * v → proj: :func:`quantlens.transforms.heads.rescale_values`.


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
    return torch.stack([graph.tensor(str(linear.weight)).abs().amax(0) for linear in group.linears]).amax(0)


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
