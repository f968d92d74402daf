"""The simulation of a plan: the FP32 graph with quantized weights, quantizers on its edges and integer operators."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlens.formats.base import Operator, Quantizer
from quantlens.graph import Edge, Graph, classifier_terms, on_axes, put_tensor, replace_argument, tensor_tree

LEAST = 1e-3
"""Factor of a channel of a classifier's input, in units of the largest one's, from which on its weight is divided by
it."""


def simulate(
    graph: Graph,
    quantizers: Mapping[str, Quantizer],
    operators: Mapping[str, Operator] | None = None,
    taps: Sequence[str] = (),
    *,
    whole: bool = False,
) -> fx.GraphModule:
    """A module images -> (logits, features) that applies ``quantizers`` on the edges named by their keys and
    ``operators`` in place of the sites named.

    taps: keys of activation edges whose values are given out too, as (logits, features, (value, …)): as read after
    their quantizer, if they have one. whole: (logits, features, all outputs of the graph) instead.
    """
    made = _Simulation(graph)
    edges = made.graph.sites.edges
    tapped = [edges[key] for key in taps]
    for key, quantizer in quantizers.items():
        if edges[key].is_weight:
            made.quantize_weight(edges[key], quantizer)
        elif edges[key].position is not None:
            made.quantize_input(edges[key], quantizer)
    for key, quantizer in quantizers.items():
        if edges[key].position is None:
            made.quantize_output(edges[key], quantizer)
    for name, operator in (operators or {}).items():
        made.replace_site(name, operator)
    return made.module(tapped, whole=whole)


class _Simulation:
    """A twin of a graph, which shares its tensors, into which quantizers and operators are put."""

    def __init__(self, graph: Graph):
        self.graph = graph.clone(share=True)
        self.sites = self.graph.sites
        self.terms = classifier_terms(self.graph)
        self.root = tensor_tree(self.graph.tensors())
        self.root.add_module("quantizers", nn.ModuleList())
        self.root.add_module("operators", nn.ModuleList())
        self.after: dict[fx.Node, fx.Node] = {}
        """node -> the call that its readers read in its place"""

    def quantize_weight(self, edge: Edge, quantizer: Quantizer) -> None:
        """A weight is quantized here, once; the simulation holds its values."""
        with torch.no_grad():
            value = quantizer(self.graph.tensor(str(edge.value.target)))
        name = f"quantized_weights.{edge.key.replace('.', '_')}"
        put_tensor(self.root, name, value)
        with self.graph.fx.inserting_before(edge.node):
            weight = self.graph.fx.get_attr(name)
        replace_argument(edge.node, edge.position, weight)  # type: ignore[arg-type]

    def _call(self, part: Quantizer | Operator, like: fx.Node, args: Any, kwargs: Any = None) -> fx.Node:
        """A call of a quantizer or operator, whose value is of the kind that ``like`` has."""
        held = "quantizers" if isinstance(part, Quantizer) else "operators"
        parts: Any = self.root.get_submodule(held)
        parts.append(part)
        call = self.graph.fx.call_module(f"{held}.{len(parts) - 1}", args, kwargs)
        call.meta = dict(like.meta)
        return call

    def quantize_input(self, edge: Edge, quantizer: Quantizer) -> None:
        """One operation reads the value through the quantizer."""
        with self.graph.fx.inserting_before(edge.node):
            call = self._call(quantizer, edge.value, (edge.value,))
        replace_argument(edge.node, edge.position, call)  # type: ignore[arg-type]

    def quantize_output(self, edge: Edge, quantizer: Quantizer) -> None:
        """Everybody reads the value through the quantizer."""
        with self.graph.fx.inserting_after(edge.node):
            call = self._call(quantizer, edge.node, (edge.node,))
        edge.node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
        self.after[edge.node] = call

    def replace_site(self, name: str, operator: Operator) -> None:
        """An operator computes in the site's place."""
        node = self.sites[name].node
        with self.graph.fx.inserting_after(node):
            call = self._call(operator, node, node.args, node.kwargs)
        node.replace_all_uses_with(call)
        self.after.setdefault(node, call)
        self.graph.fx.erase_node(node)

    def module(self, taps: Sequence[Edge], *, whole: bool) -> fx.GraphModule:
        """The module, ready to run; tensors that nothing reads any more are left out of its graph."""
        for node in reversed(list(self.graph.fx.nodes)):
            if not node.users and node.op == "get_attr":
                self.graph.fx.erase_node(node)
        tapped = tuple(self.after.get(e.node, e.node) if e.position is None else e.value for e in taps)
        output = next(n for n in self.graph.fx.nodes if n.op == "output")
        results = (self.graph.output, self._features(output))
        more = self.graph.outputs if whole else tapped
        output.update_arg(0, (*results, more) if more else results)
        return fx.GraphModule(self.root, self.graph.fx).eval()

    def _features(self, before: fx.Node) -> fx.Node | None:
        """What the classifier's linear layers read (before any quantizer on their input; several layers side by side),
        [B, D]; ``None`` without such layers."""
        read = [node.args[0] for node, _ in self.terms or ()]
        sources = list(dict.fromkeys(n.args[0] if str(n.target).startswith("quantizers.") else n for n in read))
        if not sources or any(len(s.meta.get("shape") or ()) != 2 for s in sources):
            return None
        if len(sources) == 1:
            return sources[0]
        with self.graph.fx.inserting_before(before):
            return self.graph.fx.call_function(torch.cat, (sources, 1))


def float_features(graph: Graph, features: Tensor) -> Tensor:
    """Features [B, D] of the simulation on the axes that the float model has them on: exact transforms of what the
    classifier reads undone."""
    if not graph.axes:
        return features
    sources = {node.args[0]: str(node.args[1].target) for node, _ in classifier_terms(graph) or ()}  # type: ignore[union-attr]
    parts = list(features.split([source.meta["shape"][-1] for source in sources], dim=1))  # type: ignore[union-attr]
    for number, name in enumerate(sources.values()):
        for factor, shift in graph.axes.get(name, ()):
            parts[number] = on_axes(parts[number], factor)[:, : len(shift)] + shift
    return torch.cat(parts, 1)


def classifier_of(graph: Graph, quantizers: Mapping[str, Quantizer]) -> tuple[Tensor, Tensor] | None:
    """Weight [K, D] and bias [K] of the classifier under ``quantizers``, for features on the axes of the float model
    (:func:`float_features`)."""
    terms = classifier_terms(graph)
    if not terms:
        return None
    weights: dict[fx.Node, Tensor] = {}
    bias: Tensor | float = 0.0
    with torch.no_grad():
        for node, factor in terms:
            site = graph.sites.by_node[node]
            weight = graph.tensor(site.weight)  # type: ignore[arg-type]
            quantizer = quantizers.get(f"{site.name}.weight")
            weight = factor * (quantizer(weight) if quantizer is not None else weight)
            for change, shift in graph.axes.get(str(site.weight), ()):
                weight = on_axes(weight.double(), _inverse_transpose(change.double()))[:, : len(shift)]
                bias = bias - weight @ shift.double()
            source = node.args[0]
            weights[source] = weights[source] + weight if source in weights else weight  # type: ignore[index]
            if site.bias is not None:
                bias = bias + factor * graph.tensor(site.bias)
        weight = torch.cat(list(weights.values()), dim=1).float()
        return weight, (bias + torch.zeros(weight.shape[0], device=weight.device)).float()


def _inverse_transpose(factor: Tensor) -> Tensor:
    """Of a step of :attr:`Graph.axes`, the transpose of T⁻¹, as :func:`on_axes` takes it: T itself is orthogonal. A
    channel that T (next to) takes away is 0: a quantized weight divided by next to nothing would be all error."""
    if factor.dim() == 2:
        return factor
    return torch.where(factor.abs() > LEAST * factor.abs().max(), 1 / factor, 0)
