"""What is trained of a unit: one module for every weight, scale and vector, set up in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from quantlens.formats import Quantizer, Uniform
from quantlens.graph import Edge, Graph
from quantlens.reconstruction.rounding import AdaRound
from quantlens.reconstruction.scales import LearnedScale, fake_quantize, learnable
from quantlens.reconstruction.settings import ROUNDING, SCALES, VECTORS, WEIGHTS, Settings
from quantlens.reconstruction.streams import Hook
from quantlens.reconstruction.trained_tensors import Latent, Vector, trained_vectors
from quantlens.reconstruction.units import Unit

Keep = Callable[[torch.Size], Tensor | None]
"""Shape -> which elements of an activation stay in float (bool of that shape), or None."""


@dataclass
class Learners:
    """The modules that are trained. by_edge: by key of the edge, one module where edges share a quantizer. vectors: by
    the node that holds the bias, LayerNorm scale or shift."""

    by_edge: dict[str, AdaRound | Latent | LearnedScale] = field(default_factory=dict)
    vectors: dict[fx.Node, Vector] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, quantizers: Mapping[str, Quantizer], unit: Unit, settings: Settings) -> Learners:
        """Learners for what ``settings.optimise`` names in a unit: weights that one layer alone reads, scales that can
        be learned and that no other unit shares, vectors that the unit alone reads."""
        found, inside = cls(), {edge.key for edge in unit.edges}
        uses, owners = _readers(graph), _owners(quantizers)
        scales: dict[int, LearnedScale] = {}
        for edge in unit.edges:
            quantizer = quantizers.get(edge.key)
            if edge.is_weight:
                if uses[str(edge.value.target)] == 1:
                    learner = _weight(graph.tensor(str(edge.value.target)), quantizer, settings)
                    found.by_edge |= {} if learner is None else {edge.key: learner}
            elif quantizer is None or SCALES not in settings.optimise or not learnable(quantizer):
                continue
            elif owners[id(quantizer)] <= inside:
                found.by_edge[edge.key] = scales.setdefault(id(quantizer), LearnedScale(quantizer))
        if VECTORS in settings.optimise:
            own = set(unit.nodes)
            nodes = [node for node in trained_vectors(graph) if own.issuperset(node.users)]
            found.vectors = {node: Vector(graph.tensor(str(node.target))) for node in nodes}
        return found

    def modules(self) -> list[nn.Module]:
        """All modules, each once."""
        return list({id(m): m for m in (*self.by_edge.values(), *self.vectors.values())}.values())

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.modules() for p in module.parameters()]

    def state(self) -> list[Tensor]:
        """A copy of all parameters, for :meth:`restore`."""
        return [p.detach().clone() for p in self.parameters()]

    def restore(self, state: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters(), state, strict=True):
            parameter.data.copy_(value)

    def constants(self) -> dict[fx.Node, Tensor]:
        """The vectors as trained so far, to stand in for the graph's."""
        return {node: vector() for node, vector in self.vectors.items()}

    def hook(self, graph: Graph, unit: Unit, quantizers: Mapping[str, Quantizer], keep: Keep | None = None) -> Hook:
        """Quantizes the values of a unit with gradients: by the learners in their present state, elsewhere by
        ``quantizers``. keep: elements of activations that stay in float."""
        weights: dict[str, Tensor] = {}
        for edge in unit.edges:
            if edge.is_weight and edge.key in quantizers and edge.key not in self.by_edge:
                weights[edge.key] = quantizers[edge.key](graph.tensor(str(edge.value.target)))

        def hook(key: str, value: Tensor) -> Tensor:
            if key in weights:
                return weights[key]
            learner = self.by_edge.get(key)
            if isinstance(learner, AdaRound | Latent):
                return learner()
            quantizer = quantizers.get(key)
            if quantizer is None:
                return value
            kept = None if keep is None else keep(value.shape)
            return fake_quantize(quantizer, value, kept) if learner is None else learner(value, kept)

        return hook

    def freeze(self, edges: Mapping[str, Edge]) -> tuple[dict[str, Tensor], dict[str, Quantizer]]:
        """What training made: tensors of the graph by name, quantizers by edge key. edges: all of the graph, by key."""
        tensors: dict[str, Tensor] = {}
        quantizers: dict[str, Quantizer] = {}
        frozen: dict[int, Quantizer] = {}
        for key, learner in self.by_edge.items():
            if isinstance(learner, LearnedScale):
                if id(learner) not in frozen:
                    frozen[id(learner)] = learner.freeze()
                quantizers[key] = frozen[id(learner)]
            else:
                tensors[str(edges[key].value.target)] = learner.harden()
        tensors |= {str(node.target): vector.detach() for node, vector in self.constants().items()}
        return tensors, quantizers


def _readers(graph: Graph) -> dict[str, int]:
    """How many layers read a weight, by its name."""
    uses: dict[str, int] = {}
    for edge in graph.sites.edges.values():
        if edge.is_weight:
            uses[str(edge.value.target)] = uses.get(str(edge.value.target), 0) + 1
    return uses


def _owners(quantizers: Mapping[str, Quantizer]) -> dict[int, set[str]]:
    """Keys of the edges that share a quantizer, by its id."""
    owners: dict[int, set[str]] = {}
    for key, quantizer in quantizers.items():
        owners.setdefault(id(quantizer), set()).add(key)
    return owners


def _weight(weight: Tensor, quantizer: Quantizer | None, settings: Settings) -> AdaRound | Latent | None:
    """The learner of a weight, None where it stays as it is."""
    if (quantizer is None and not settings.float_weights) or not bool(torch.isfinite(weight).all()):
        return None
    if ROUNDING in settings.optimise and isinstance(quantizer, Uniform):
        return AdaRound(quantizer, weight, straight_through=settings.straight_through)
    return Latent(quantizer, weight) if WEIGHTS in settings.optimise else None
