"""What is trained of a unit: one module for every weight, scale and vector, set up in one place; and Adam, as
everything here is trained with it."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlens.formats import Quantizer, Uniform
from quantlens.graph import Edge, EdgeHook, Graph, dynamic_nodes, op_name
from quantlens.reconstruction.scales import AdaRound, LearnedScale, fake_quantize, learnable
from quantlens.reconstruction.settings import ROUNDING, SCALES, VECTORS, WEIGHTS, Settings
from quantlens.reconstruction.units import Unit, quantized_weights, random_mask

AFFINE = ("aten.layer_norm.default", "aten.linear.default", "aten.conv2d.default")
"""Operations whose vectors (biases, scale and shift) are trained."""


class Latent(nn.Module):
    """A trained float weight, used straight through its quantizer.

    quantizer: of the weight, or None for a weight that stays in float. weight: where it starts, float32. :attr:`step`
    is the parameter: the distance from the start in units of ``scale`` (by default that of the quantizer, or the
    weight's standard deviation for a format without one scale or no quantizer), so that one learning rate suits
    weights of any size.
    """

    def __init__(self, quantizer: Any, weight: Tensor, scale: Tensor | None = None):
        super().__init__()
        self.quantizer = quantizer
        if scale is None:
            uniform = isinstance(quantizer, Uniform)
            scale = quantizer.spread(quantizer.scale, weight.dim()) if uniform else weight.std()
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("start", weight.detach().clone())
        self.step = nn.Parameter(torch.zeros_like(weight))

    def latent(self) -> Tensor:
        """The float weight now."""
        return self.start + self.step * self.scale

    def forward(self) -> Tensor:
        """The weight as the layer uses it, with its gradient."""
        return self.latent() if self.quantizer is None else fake_quantize(self.quantizer, self.latent())

    @torch.no_grad()
    def harden(self) -> Tensor:
        """The weight as the layer uses it: on the grid of its quantizer, or in float without one."""
        return self.latent() if self.quantizer is None else self.quantizer(self.latent())


class Vector(Latent):
    """A trained vector (bias, LayerNorm's scale or shift), in units of its root mean square (1 for one of zeros)."""

    def __init__(self, vector: Tensor):
        size = vector.square().mean().sqrt()
        super().__init__(None, vector, torch.where(size > 0, size, torch.ones_like(size)))


def trained_vectors(graph: Graph) -> list[fx.Node]:
    """Float vectors (biases, LayerNorms' scale and shift) that one operation of :data:`AFFINE` alone reads."""
    dynamic = dynamic_nodes(graph)
    nodes = [node for node in graph.fx.nodes if node.op == "get_attr"]
    uses = Counter(node.target for node in nodes)
    found = []
    for node in nodes:
        tensor, readers = graph.tensor(str(node.target)), list(node.users)
        alone = uses[node.target] == len(readers) == 1 and readers[0] in dynamic and op_name(readers[0]) in AFFINE
        if alone and tensor.dim() == 1 and tensor.is_floating_point() and bool(torch.isfinite(tensor).all()):
            found.append(node)
    return found


@dataclass
class Learners:
    """The modules that are trained. by_edge: by key of the edge, one module where edges share a quantizer. vectors: by
    the node that holds the bias, LayerNorm scale or shift."""

    by_edge: dict[str, AdaRound | Latent | LearnedScale] = field(default_factory=dict)
    vectors: dict[fx.Node, Vector] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        graph: Graph,
        quantizers: Mapping[str, Quantizer],
        unit: Unit,
        settings: Settings,
        unrounded: Mapping[str, Tensor] | None = None,
    ) -> "Learners":
        """Learners for what ``settings.optimise`` names in a unit: weights that one layer alone reads, scales that can
        be learned and that no other unit shares, vectors that the unit alone reads."""
        found, inside = cls(), {edge.key for edge in unit.edges}
        uses = Counter(str(edge.value.target) for edge in graph.sites.edges.values() if edge.is_weight)
        shared = {id(quantizer) for key, quantizer in quantizers.items() if key not in inside}
        scales: dict[int, LearnedScale] = {}
        for edge in unit.edges:
            quantizer = quantizers.get(edge.key)
            if edge.is_weight:
                name = str(edge.value.target)
                learner = _weight(graph.tensor(name), quantizer, settings, (unrounded or {}).get(name))
                if learner is not None and uses[name] == 1:
                    found.by_edge[edge.key] = learner
            elif SCALES in settings.optimise and learnable(quantizer) and id(quantizer) not in shared:
                found.by_edge[edge.key] = scales.setdefault(id(quantizer), LearnedScale(quantizer))  # type: ignore[arg-type]
        if VECTORS in settings.optimise:
            own = set(unit.nodes)
            nodes = [node for node in trained_vectors(graph) if own.issuperset(node.users)]
            found.vectors = {node: Vector(graph.tensor(str(node.target))) for node in nodes}
        return found

    def modules(self) -> list[nn.Module]:
        """All modules, each once."""
        return list(dict.fromkeys((*self.by_edge.values(), *self.vectors.values())))

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

    def hook(
        self, graph: Graph, unit: Unit, quantizers: Mapping[str, Quantizer], drop: float, generator: torch.Generator
    ) -> EdgeHook:
        """Quantizes the values of a unit with gradients: by the learners in their present state, elsewhere by
        ``quantizers``. drop: probability that an element of an activation stays in float, drawn by ``generator``."""
        frozen = {key: quantizer for key, quantizer in quantizers.items() if key not in self.by_edge}
        weights = quantized_weights(graph, unit, frozen, {})

        def hook(key: str, value: Tensor) -> Tensor:
            if key in weights:
                return weights[key]
            learner = self.by_edge.get(key)
            if isinstance(learner, AdaRound | Latent):
                return learner()
            quantizer = quantizers.get(key)
            if quantizer is None:
                return value
            kept = random_mask(value.shape, drop, generator, value.device) if drop > 0 else None
            return fake_quantize(quantizer, value, kept) if learner is None else learner(value, kept)

        return hook

    def freeze(self, edges: Mapping[str, Edge]) -> tuple[dict[str, Tensor], dict[str, Quantizer]]:
        """What training made: tensors of the graph by name, quantizers by edge key. edges: all of the graph, by key."""
        frozen = {module: module.freeze() for module in self.modules() if isinstance(module, LearnedScale)}
        quantizers = {key: frozen[learner] for key, learner in self.by_edge.items() if learner in frozen}
        weights = {key: learner for key, learner in self.by_edge.items() if key not in quantizers}
        tensors = {str(edges[key].value.target): learner.harden() for key, learner in weights.items()}
        return tensors | {str(node.target): vector.harden() for node, vector in self.vectors.items()}, quantizers


def _weight(
    weight: Tensor, quantizer: Quantizer | None, settings: Settings, unrounded: Tensor | None = None
) -> AdaRound | Latent | None:
    """The learner of a weight, None where it stays as it is. unrounded: what it was rounded from."""
    if (quantizer is None and not settings.float_weights) or not bool(torch.isfinite(weight).all()):
        return None
    if ROUNDING in settings.optimise and isinstance(quantizer, Uniform):
        start, weight = (None, weight) if unrounded is None else (weight, unrounded.reshape(weight.shape))
        return AdaRound(quantizer, weight, straight_through=settings.straight_through, rounded=start)
    return Latent(quantizer, weight) if WEIGHTS in settings.optimise else None


# -- Adam -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate. falling: the rate falls to zero along a cosine; else it stays."""

    parameters: Sequence[Tensor]
    rate: float
    falling: bool = True


def train(
    groups: Sequence[Group], steps: int, loss: Callable[[float], Tensor], tell: Callable[[int], None] | None = None
) -> None:
    """Take ``steps`` steps of Adam. loss: share of the steps done, in [0, 1) -> scalar, of a mini-batch of its own
    choice; it is computed with gradients, also for a caller in ``no_grad`` or inference mode. tell: called with the
    number of steps done."""
    optimiser = torch.optim.Adam([{"params": list(g.parameters), "lr": g.rate} for g in groups])
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, state in zip(groups, optimiser.param_groups, strict=True):
            state["lr"] = group.rate * (cosine if group.falling else 1.0)
        with torch.inference_mode(False), torch.enable_grad():
            value = loss(step / steps)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
        optimiser.step()
        if tell is not None:
            tell(step + 1)
