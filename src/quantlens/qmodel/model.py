"""The plan, and the model that follows it.

A :class:`Plan` is plain data: for every edge of every site its quantizer, the exact rewrites that were done, and who
made it (method, options, seed, calibration images, checkpoint). A :class:`QuantizedModel` is a graph and a plan;
simulation, checkpoint, export, study and report read the same two.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from quantlens.errors import UnknownNameError
from quantlens.formats.base import Quantizer
from quantlens.formats.operators import Operator
from quantlens.graph.capture import graph_of
from quantlens.graph.graph import Graph, put_tensor, replace_argument, with_features
from quantlens.graph.sites import Edge, classifier_terms

MB = 1_000_000

CACHED = 4 << 20
"""Bytes of the largest activation that a CPU may work on at once: larger ones leave its cache between two operations
(DeiT-Tiny on two cores, images a second in batches of 6 and of 64: FP32 40 and 35, simulated W4A4 37 and 28)."""


class Outputs(NamedTuple):
    """What a model gives for a batch: logits [B, K]; features [B, D] that the classifier reads, or None."""

    logits: Tensor
    features: Tensor | None


@dataclass
class Plan:
    """Everything that makes the quantized model out of the FP32 graph.

    quantizers: edge key -> quantizer (``blocks.3.attn.qkv.weight``, ``blocks.3.attn.probs.output`` …).
    rewrites: exact rewrites done to the graph, as sentences a person can read.
    info: method, bits, seed, options, calibration, checkpoint … (JSON-able).
    operators: site name -> integer operator that computes in the site's place (integer LayerNorm, softmax).
    """

    quantizers: dict[str, Quantizer] = field(default_factory=dict)
    rewrites: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    operators: dict[str, Operator] = field(default_factory=dict)


class QuantizedModel(nn.Module):
    """A graph simulated under a plan. ``qmodel(images)`` gives logits [B, K].

    Weights are quantized once, when the simulation is built; activations pass through their quantizers in every
    forward.

    graph: the FP32 graph after the plan's rewrites. plan: see :class:`Plan`. preprocess: how images become its input.
    reference: the FP32 model it was made from, or None (a model read from a file does not have it).
    """

    def __init__(self, graph: Graph, plan: Plan, *, preprocess: Any, reference: Any = None):
        super().__init__()
        unknown = [key for key in plan.quantizers if key not in graph.sites.edges]
        if unknown:
            raise UnknownNameError("quantization site edge", unknown[0], graph.sites.edges)
        self.graph = graph
        self.plan = plan
        absent = [name for name in plan.operators if name not in graph.sites]
        if absent:
            raise UnknownNameError("quantization site", absent[0], [site.name for site in graph.sites])
        self.quantizers = nn.ModuleList(plan.quantizers.values())
        self.operators = nn.ModuleList(plan.operators.values())
        self.preprocess = preprocess
        self._reference = [reference]  # in a list: not a submodule
        self._simulation: list[fx.GraphModule | None] = [None]
        self.eval()

    # -- running ----------------------------------------------------------------------------------------------------
    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] float32, normalised -> logits [B, K]."""
        return self.simulation()(images)[0]

    def outputs(self, images: Tensor) -> Outputs:
        """Logits and the features that the classifier reads (before its own input quantizer)."""
        return Outputs(*self.simulation()(images))

    def simulation(self) -> fx.GraphModule:
        """The graph with weights replaced by their quantized values and quantizers on the other edges (built once)."""
        if self._simulation[0] is None:
            self._simulation[0] = simulate(self.graph, self.plan.quantizers, self.plan.operators)
        return self._simulation[0]

    def classifier(self) -> tuple[Tensor, Tensor] | None:
        """Weight [K, D] and bias [K] of the classifier as quantized, on the features of :meth:`outputs`; None if it
        has none."""
        return classifier_of(self.graph, self.plan.quantizers)

    # -- what it is -------------------------------------------------------------------------------------------------
    @property
    def reference(self) -> Any:
        return self._reference[0]

    @property
    def name(self) -> str:
        return self.plan.info.get("model", "model")

    @property
    def method(self) -> str:
        return self.plan.info.get("method", "custom")

    @property
    def bits(self) -> str:
        return self.plan.info.get("bits", "")

    @property
    def seed(self) -> int:
        return self.plan.info.get("seed", 0)

    @property
    def options(self) -> dict[str, Any]:
        return self.plan.info.get("options", {})

    @property
    def calibration(self) -> dict[str, Any] | None:
        return self.plan.info.get("calibration")

    @property
    def checkpoint_sha256(self) -> str | None:
        return self.plan.info.get("checkpoint_sha256")

    @property
    def class_names(self) -> list[str] | None:
        return self.plan.info.get("class_names")

    @property
    def num_classes(self) -> int:
        return int(self.graph.output.meta["shape"][-1])

    @property
    def num_parameters(self) -> int:
        return self.graph.num_parameters()

    @property
    def device(self) -> torch.device:
        return self.graph.device

    @property
    def images_together(self) -> int | None:
        """How many images are fastest in one forward pass: those whose largest activation stays within :data:`CACHED`
        on a CPU (at least 1), None for as many as memory holds elsewhere."""
        if self.device.type != "cpu":
            return None
        shapes = (n.meta.get("shape") or () for n in self.graph.fx.nodes if n.op == "call_function")
        largest = max((math.prod(d for d in shape if d is not None) for shape in shapes), default=1)
        return max(1, CACHED // (4 * max(largest, 1)))

    @property
    def size_mb(self) -> float:
        """Megabytes (10⁶ bytes) of the packed model: integer codes at their width, scales, what stays in float."""
        return self.size_bytes() / MB

    @property
    def size_ratio(self) -> float:
        """Packed size over FP32 size."""
        return self.size_bytes() / (4 * self.num_parameters)

    def size_bytes(self) -> int:
        total = sum(t.numel() * t.element_size() for t in self.graph.tensors().values())
        for edge, quantizer in self.weight_edges():
            weight = self.graph.tensor(str(edge.value.target))
            total += -(-weight.numel() * quantizer.bits // 8) - weight.numel() * weight.element_size()
        return total + sum(t.numel() * t.element_size() for q in self._parts() for t in q.tensors().values())

    def _parts(self) -> list[Any]:
        return [*self.plan.quantizers.values(), *self.plan.operators.values()]

    def weight_edges(self) -> list[tuple[Edge, Quantizer]]:
        """Edges of quantized weights with their quantizers, in graph order."""
        edges = self.graph.sites.edges
        return [(edges[k], q) for k, q in self.plan.quantizers.items() if edges[k].is_weight]

    # -- moving, saving -----------------------------------------------------------------------------------------------
    def to(self, *args: Any, **kwargs: Any) -> QuantizedModel:
        super().to(*args, **kwargs)
        self.graph.to(*args, **kwargs)
        self._simulation[0] = None
        return self

    def save(self, path: Any) -> Any:
        """Write the packed checkpoint; the same as :func:`quantlens.save`."""
        from quantlens.qmodel.checkpoint import save

        return save(self, path)

    def __deepcopy__(self, memo: dict) -> QuantizedModel:
        plan = Plan(
            {k: copy.deepcopy(q, memo) for k, q in self.plan.quantizers.items()},
            list(self.plan.rewrites),
            copy.deepcopy(self.plan.info),
            {k: copy.deepcopy(o, memo) for k, o in self.plan.operators.items()},
        )
        return QuantizedModel(self.graph.clone(), plan, preprocess=self.preprocess, reference=self.reference)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.method}, {self.bits}, {self.size_mb:.2f} MB"


def float_model(model: Any) -> QuantizedModel:
    """A loaded FP32 model as a QuantizedModel with an empty plan (method "fp32"), so that it is run and measured the
    same way. It shares the model's graph and is to be read; ``float_copy`` makes one to hand out.

    model: :class:`quantlens.models.Model` (captured once and kept on it) or a QuantizedModel, returned as it is.
    """
    if isinstance(model, QuantizedModel):
        return model
    if "float_model" not in model.derived:
        model.derived["float_model"] = _float(model, graph_of(model))
    return model.derived["float_model"]


def float_copy(model: Any) -> QuantizedModel:
    """As :func:`float_model`, with a graph and a plan of its own: whatever is done to it, ``model`` stays as it is."""
    return _float(model, graph_of(model).clone())


def _float(model: Any, graph: Graph) -> QuantizedModel:
    info = {**describe(model), "method": "fp32", "bits": "FP32", "seed": 0, "options": {}, "calibration": None}
    return QuantizedModel(graph, Plan(info=info), preprocess=model.preprocess)


def describe(model: Any) -> dict[str, Any]:
    """What a plan says of the model it was made from."""
    return {
        "model": model.name,
        "checkpoint": model.checkpoint,
        "checkpoint_sha256": model.checkpoint_sha256,
        "class_names": model.class_names,
    }


def simulate(
    graph: Graph,
    quantizers: dict[str, Quantizer],
    operators: dict[str, Operator] | None = None,
    taps: Sequence[str] = (),
) -> fx.GraphModule:
    """A module images -> (logits, features) that applies ``quantizers`` on the edges named by their keys and
    ``operators`` in place of the sites named.

    taps: keys of activation edges whose values are given out too, as (logits, features, (value, …)): as read behind
    their quantizer, if they have one.
    """
    twin = graph.clone(share=True)
    sites, edges = twin.sites, twin.sites.edges
    terms = classifier_terms(twin)
    root = nn.Module()
    for name, value in twin.tensors().items():
        put_tensor(root, name, value)
    modules = nn.ModuleList()
    root.add_module("quantizers", modules)
    outputs: list[tuple[Edge, Quantizer]] = []
    placed: dict[tuple[fx.Node, int], fx.Node] = {}
    behind: dict[fx.Node, fx.Node] = {}
    for key, quantizer in quantizers.items():
        edge = edges[key]
        if edge.is_weight:
            with torch.no_grad():
                value = quantizer(twin.tensor(str(edge.value.target)))
            name = f"quantized_weights.w{len(placed)}_{len(outputs)}_{key.replace('.', '_')}"
            put_tensor(root, name, value)
            with twin.fx.inserting_before(edge.node):
                weight = twin.fx.get_attr(name)
            replace_argument(edge.node, edge.position, weight)  # type: ignore[arg-type]
            continue
        if edge.position is None:
            outputs.append((edge, quantizer))
            continue
        modules.append(quantizer)
        with twin.fx.inserting_before(edge.node):
            call = twin.fx.call_module(f"quantizers.{len(modules) - 1}", (edge.value,))
        call.meta = dict(edge.value.meta)
        replace_argument(edge.node, edge.position, call)
    for edge, quantizer in outputs:
        modules.append(quantizer)
        with twin.fx.inserting_after(edge.node):
            call = twin.fx.call_module(f"quantizers.{len(modules) - 1}", (edge.node,))
        call.meta = dict(edge.node.meta)
        behind[edge.node] = call
        edge.node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
    if operators:
        root.add_module("operators", nn.ModuleList(operators.values()))
    for index, name in enumerate(operators or {}):
        node = sites[name].node
        with twin.fx.inserting_after(node):
            call = twin.fx.call_module(f"operators.{index}", node.args, node.kwargs)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        behind.setdefault(node, call)
        twin.fx.erase_node(node)
    for node in reversed(list(twin.fx.nodes)):
        if not node.users and node.op == "get_attr":
            twin.fx.erase_node(node)
    tapped = []
    for key in taps:
        edge = edges[key]
        tapped.append(behind.get(edge.node, edge.node) if edge.position is None else edge.value)
    module = with_features(twin.fx, root, terms, tapped)
    module.eval()
    return module


def classifier_of(graph: Graph, quantizers: dict[str, Quantizer]) -> tuple[Tensor, Tensor] | None:
    """Weight [K, D] and bias [K] of the classifier under ``quantizers``, for features as ``with_features`` gives
    them."""
    terms = classifier_terms(graph)
    if not terms:
        return None
    by_node = {s.node: s for s in graph.sites}
    weights: dict[fx.Node, Tensor] = {}
    bias: Tensor | float = 0.0
    with torch.no_grad():
        for node, factor in terms:
            site = by_node[node]
            weight = graph.tensor(site.weight)  # type: ignore[arg-type]
            quantizer = quantizers.get(f"{site.name}.weight")
            weight = factor * (quantizer(weight) if quantizer is not None else weight)
            source = node.args[0]
            weights[source] = weights[source] + weight if source in weights else weight  # type: ignore[index]
            if site.bias is not None:
                bias = bias + factor * graph.tensor(site.bias)
        weight = torch.cat(list(weights.values()), dim=1)
        return weight, bias + torch.zeros(weight.shape[0], device=weight.device)
