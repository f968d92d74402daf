"""Channel equalisation: factors per channel that move range from activations into weights, exactly.

* LayerNorm → linear layers: LN(x)/s − t, W·diag(s), bias + W·diag(s)·t (:func:`quantlens.graph.rescale_norm`). Factors:
  :func:`smooth_factors` (SmoothQuant, Xiao et al., ICML 2023, eq. 4) or :func:`balance` (ranges brought towards each
  other and centred, as RepQ-ViT's section 3.2 does with scales and zero points).
* v → proj: the attention's context is linear in v, channel by channel. The rows of the layer that makes v are divided,
  the columns of the layer that reads the context multiplied (:func:`find_value_pairs`, :func:`rescale_values`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.errors import QuantlensError
from quantlens.graph import Graph, NormGroup, Site, rescale_norm
from quantlens.graph.graph import VIEWS, op_name


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
    """[C] largest magnitude of every column of the linear layers behind a LayerNorm."""
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
        channels = graph.tensor(str(group.norm.node.args[2].target)).shape  # type: ignore[union-attr]
        good = bool((chosen.scale > 0).all()) and all(
            bool(torch.isfinite(t).all()) for t in (chosen.scale, chosen.shift)
        )
        if chosen.scale.shape != channels or chosen.shift.shape != channels or not good:
            raise QuantlensError(
                f"{group.norm.name}: equalisation needs {tuple(channels)} positive finite factors and finite shifts"
            )
        rescale_norm(graph, group, chosen.scale, chosen.shift)
        done.append(group.norm.name)
    return done


# -- v → proj ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ValuePair:
    """A linear layer that makes v and the one that reads the context, with their channels matched.

    context: the attention product. values: the layer that makes v; rows [C]: its output channels that are v.
    proj: the layer that reads the context; of[j] in 0 … C − 1: which of ``rows`` its input column j carries.
    """

    context: Site
    values: Site
    rows: Tensor
    proj: Site
    of: Tensor


def find_value_pairs(graph: Graph) -> list[ValuePair]:
    """The pairs where the graph proves that dividing rows of v and multiplying columns of proj is exact.

    Proof by execution: the numbers of the channels are sent through the operations between the layer and v, and
    between the context and the next layer. Every one of these must only move values, every channel must arrive at one
    place of every token, v's channels must be read by nothing but this product, and the context by nothing but one
    linear layer.
    """
    by_node = {site.node: site for site in graph.sites}
    pairs = []
    for context in graph.sites.of_kind("context"):
        source = _source(context.edges["v"].value)
        values = by_node.get(source)
        if values is None or values.kind != "linear":
            continue
        seen = _numbers(graph, source)
        if seen is None:
            continue
        readers = [(u, a) for a in seen for u in a.users if u not in seen and u.op == "call_function"]
        wanted = seen.get(context.edges["v"].value)
        heads = _one_per_channel(wanted)
        if wanted is None or heads is None:
            continue
        rows = heads.flatten()  # v is [.., heads, tokens, d]; a channel is (head, d)
        others = [seen[a] for u, a in readers if not (u is context.node and a is context.edges["v"].value)]
        if graph.output in seen or any(bool(torch.isin(rows, o).any()) for o in others if isinstance(o, Tensor)):
            continue
        after = _numbers(graph, context.node, like=heads)
        if after is None or graph.output in after:
            continue
        ends = [(u, a) for a in after for u in a.users if u not in after]
        if len(ends) != 1 or op_name(ends[0][0]) != "aten.linear.default" or ends[0][0].args[0] is not ends[0][1]:
            continue
        proj, of = by_node.get(ends[0][0]), _one_per_column(after[ends[0][1]])
        if (
            proj is None
            or of is None
            or len(of) != len(rows)
            or not torch.equal(of.sort().values, torch.arange(len(of)))
        ):
            continue
        pairs.append(ValuePair(context, values, rows, proj, of))
    return pairs


def rescale_values(graph: Graph, pair: ValuePair, scale: Tensor) -> None:
    """Divide v by ``scale`` [C] > 0 (in the order of ``pair.rows``) and undo it in proj's columns, exactly."""
    weight, name = graph.tensor(str(pair.values.weight)), str(pair.values.weight)
    factor = torch.ones(weight.shape[0], dtype=torch.float64, device=weight.device)
    factor[pair.rows.to(weight.device)] = scale.to(weight.device, torch.float64)
    graph.set_tensor(name, (weight.double() / factor[:, None]).to(weight.dtype))
    if pair.values.bias is not None:
        bias = graph.tensor(pair.values.bias)
        graph.set_tensor(pair.values.bias, (bias.double() / factor).to(bias.dtype))
    columns_of = scale.to(weight.device, torch.float64)[pair.of.to(weight.device)]
    proj = graph.tensor(str(pair.proj.weight))
    graph.set_tensor(str(pair.proj.weight), (proj.double() * columns_of).to(proj.dtype))


def _source(node: Any) -> Any:
    while isinstance(node, fx.Node) and op_name(node) in VIEWS:
        node = node.args[0]
    return node


def _numbers(graph: Graph, start: fx.Node, like: Tensor | None = None) -> dict[fx.Node, Any] | None:
    """Channel numbers behind ``start`` through all operations that only move values: node -> int64 tensor (or a tuple
    of them). ``start`` holds the number of its last channel, or (head, channel) numbers for ``like`` [.., heads, d]."""
    shape = start.meta["shape"]
    if shape is None:
        return None
    # two images; windows make several rows of an image, so the first dimension is found by trial
    for rows in (2, *(2 * n for n in _window_counts(graph))):
        size = [rows if d is None else d for d in shape]
        if like is None:
            value = torch.arange(size[-1]).expand(*size)
        else:
            if len(size) < 3 or size[-3] != like.shape[0] or size[-1] != like.shape[1]:
                return None
            value = torch.arange(like.numel()).view(like.shape[0], 1, like.shape[1]).expand(*size)
        env: dict[fx.Node, Any] = {start: value}
        stub: dict[fx.Node, Any] = {graph.input: torch.empty((2, *graph.input.meta["shape"][1:]), device="meta")}
        try:
            queue = [start]
            while queue:
                for user in queue.pop(0).users:
                    if user not in env and op_name(user) in VIEWS and user.args[0] in env:
                        args = fx.map_arg(user.args, lambda n, e=env, s=stub: e[n] if n in e else graph._value(n, s))
                        env[user] = user.target(*args, **user.kwargs)  # type: ignore[operator]
                        queue.append(user)
        except (RuntimeError, IndexError, TypeError):
            continue
        if all(_fits(value, node.meta.get("shape")) for node, value in env.items()):
            return env
    return None


def _fits(value: Any, shape: tuple | None) -> bool:
    """Whether a value has the shape that its node had in the capture (None: any size)."""
    if shape is None or not isinstance(value, Tensor):
        return True
    return value.dim() == len(shape) and all(b is None or a == b for a, b in zip(value.shape, shape, strict=True))


def _window_counts(graph: Graph) -> list[int]:
    """Numbers of windows per image that the graph multiplies its batch with."""
    counts = {
        a
        for node in graph.fx.nodes
        if node.op == "call_function" and node.meta.get("symbolic") and op_name(node) == "<built-in function mul>"
        for a in node.args
        if isinstance(a, int)
    }
    return sorted(counts)


def _one_per_channel(numbers: Any) -> Tensor | None:
    """[heads, d] if ``numbers`` [.., heads, tokens, d] holds the same number for every image and token."""
    if not isinstance(numbers, Tensor) or numbers.dim() < 3:
        return None
    first = numbers.reshape(-1, *numbers.shape[-3:])[0, :, 0, :]
    same = bool((numbers == first[:, None, :]).all())
    return first if same and len(first.flatten().unique()) == first.numel() else None


def _one_per_column(numbers: Any) -> Tensor | None:
    """[C] if ``numbers`` [.., C] holds the same number for every image and token."""
    if not isinstance(numbers, Tensor) or numbers.dim() < 2:
        return None
    first = numbers.reshape(-1, numbers.shape[-1])[0]
    return first if bool((numbers == first).all()) else None


__all__ = [
    "Factors",
    "ValuePair",
    "balance",
    "columns",
    "equalise_norms",
    "find_value_pairs",
    "rescale_values",
    "smooth_factors",
]
