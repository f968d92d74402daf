"""The edges that a fully quantized method quantizes, and those that a target asks for."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from quantlens.calibration import Calibration, CalibrationPass, EdgeView, affine
from quantlens.formats import Quantizer
from quantlens.graph import SCALINGS, VIEWS, Edge, Graph, coordinates, op_name
from quantlens.qmodel import Plan, Target


def everything_edges(graph: Graph) -> list[tuple[Edge, ...]]:
    """What a fully quantized method quantizes besides weights, in graph order: groups of edges that carry one tensor
    and so share one quantizer.

    Every value is quantized where it is made: at the ``output`` edge of the site that made it, and from there through
    operations that move values or multiply them by one number. What no site made (pixels, the sum with the position
    embedding, a concatenation, pooled tokens) is quantized at the edges that read it, which form one group. A softmax
    reads its own ``input`` edge, after bias and mask; where neither stands between it and the scores, that edge
    alone is quantized, the scores being the same tensor up to one number. Channels that are chosen out of a tensor (a
    layer split in two) are quantized where they are read. A classifier's output counts too, `coordinates` do not.
    """
    made, places = {site.edges["output"].node for site in graph.sites}, coordinates(graph)
    softmaxes = graph.sites.of_kind("probs")
    passed_on = {_origin(s.edges["input"].value) for s in softmaxes} & {s.node for s in graph.sites.of_kind("scores")}
    groups: dict[Any, list[Edge]] = {}
    for site in graph.sites:
        chosen = set(map(op_name, site.node.users)) <= {"aten.index_select.default"}
        for edge in (edge for edge in site.edges.values() if not (edge.is_weight or edge.key in places)):
            if edge.position is None:
                if site.node not in passed_on and not chosen:
                    groups.setdefault(site.node, []).append(edge)
            elif site.kind == "probs":
                groups[edge.key] = [edge]
            elif _origin(edge.value) not in made:
                groups.setdefault(_origin(edge.value, scalings=False), []).append(edge)
    return [tuple(edges) for edges in groups.values()]


def quantized_tensors(graph: Graph, calibration: Calibration, bits: int, seed: int) -> dict[str, Quantizer]:
    """Asymmetric quantizers of all of :func:`everything_edges`, by key, and of queries that are scaled before their
    product: over the whole range seen, with zero in it."""
    queries = [site.edges["q"] for site in graph.sites.of_kind("scores")]
    scaled = [(q,) for q in queries if op_name(_origin(q.value, scalings=False)) in SCALINGS]
    return _over_whole_ranges(graph, calibration, [*everything_edges(graph), *scaled], bits, seed)


def of_target(target: Target, graph: Graph, plan: Plan, calibration: Calibration, seed: int) -> dict[str, Quantizer]:
    """Quantizers of activations, over the whole range seen, that a target asks for: of every tensor; or of inputs and
    outputs of linear and conv layers with a quantized weight, where the plan has none (layers that read one value share
    its quantizer); else none."""
    if target.everything:
        return quantized_tensors(graph, calibration, target.activations[0], seed)
    groups: dict[Any, list[Edge]] = {}
    for site in graph.sites if target.layers else ():
        if site.kind in ("linear", "conv") and site.edges["weight"].key in plan.quantizers:
            for edge in (site.edges["input"], site.edges["output"]):
                if edge.key not in plan.quantizers:
                    groups.setdefault((edge.value, edge.position is None), []).append(edge)
    if not groups:
        return {}
    made = _over_whole_ranges(graph, calibration, list(map(tuple, groups.values())), target.activations[0], seed)
    return {key: target.conform(key, quantizer) for key, quantizer in made.items()}


def _over_whole_ranges(
    graph: Graph, calibration: Calibration, edges: Sequence[tuple[Edge, ...]], bits: int, seed: int
) -> dict[str, Quantizer]:
    """An asymmetric quantizer of each group of edges, by key."""
    groups = {group[0]: group for group in edges}

    def on_edge(edge: Edge, view: EdgeView) -> Quantizer:
        seen = view(tail=0.0, sample=False)
        return affine(seen.low.clamp_max(0.0), seen.high.clamp_min(0.0), bits)

    made = CalibrationPass(graph, calibration, sequential=False, seed=seed).run(list(groups), on_edge)
    return {edge.key: made[first] for first, group in groups.items() for edge in group}


def _origin(value: fx.Node, *, scalings: bool = True) -> fx.Node:
    """Where a value comes from, through operations that only move it or (``scalings``) multiply it by one number."""
    while op_name(value) in VIEWS or (
        scalings and op_name(value) in SCALINGS and len(value.args) == 2 and isinstance(value.args[1], int | float)
    ):
        value = value.args[0]  # type: ignore[assignment]
    return value
