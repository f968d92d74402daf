"""What a method that is a composition consists of: exact transforms in order, a range rule, a weight fit; and the
transforms of quantlens' own methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantlens.calibration import Calibration, CalibrationPass, EdgeView, Observation, Transform
from quantlens.calibration.measured_transforms import subtract_means
from quantlens.calibration.ranges import mse
from quantlens.formats import GroupScaled, Quantizer
from quantlens.graph import Edge, Graph
from quantlens.graph.sites import Site
from quantlens.methods._layer_fit import layer_moments
from quantlens.methods.base import Widths, matmul_operand_edges
from quantlens.qmodel import Plan
from quantlens.qmodel.bits import FLOAT
from quantlens.reconstruction.bias import corrected_layers
from quantlens.reconstruction.closed_form import Factor, Grid, Moments, output_shift, ridge, round_columns
from quantlens.transforms.heads import find_score_pairs, find_value_pairs, rotate_scores, rotate_values
from quantlens.transforms.layers import alone, ensure_bias
from quantlens.transforms.norms import find_norm_groups
from quantlens.transforms.rotation import (
    SMALLEST,
    find_residuals,
    hadamard,
    layers_after_activations,
    mean_keeping,
    rotate_input,
    rotate_residual,
    rotation_size,
)

COARSE = 6
"""Bits of an activation at which a rotation at run time is worth its product."""

AUTO, ALL, NONE = "auto", "all", "none"


@dataclass
class Work:
    """A quantization under way, as its transforms see and change it. means: of channels, by edge key, where a transform
    has measured them."""

    graph: Graph
    calibration: Calibration
    bits: Widths
    generator: torch.Generator
    means: dict[str, Tensor] = field(default_factory=dict)

    def width(self, edge: Edge) -> int:
        return self.bits.of(self.graph, edge)

    def any_coarse(self) -> bool:
        """Whether some activation has :data:`COARSE` bits or fewer."""
        return any(self.width(e) <= COARSE for e in matmul_operand_edges(self.graph) if not e.is_weight)

    def rotates(self, site: Site, wanted: str) -> bool:
        """Whether the input of a layer is rotated at run time: all of them, none, or (auto) coarse ones."""
        if wanted == NONE or rotation_size(self.graph, site) < SMALLEST:
            return False
        width = self.width(site.edges["input"])
        return width != FLOAT and (wanted == ALL or width <= COARSE)


ExactTransform = Callable[[Work], list[str]]
"""Rewrites the graph of a :class:`Work` exactly; returns sentences of what it did."""


def apply(transforms: Iterable[ExactTransform], work: Work) -> list[str]:
    """Apply transforms in order; returns their sentences."""
    done: list[str] = []
    for transform in transforms:
        done += transform(work)
        work.graph.invalidate()
    return done


# -- exact transforms -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RotateResidual:
    """Rotate residual streams at no cost, but for those whose LayerNorms' outputs are rotated at run time instead."""

    norm_outputs: RotateNormOutputs

    def __call__(self, work: Work) -> list[str]:
        lifted = {site.name for site in self.norm_outputs.sites(work)}
        residuals = [r for r in find_residuals(work.graph) if not lifted & {x.name for n in r.norms for x in n.linears}]
        for residual in residuals:
            rotate_residual(work.graph, residual, mean_keeping(residual.channels, work.generator))
        return [f"residual stream rotated ({len(residuals)})"] if residuals else []


@dataclass(frozen=True)
class RotateHeads:
    """Rotate v with the layer that reads the context, and q with k, in every head."""

    def __call__(self, work: Work) -> list[str]:
        values, scores = find_value_pairs(work.graph), find_score_pairs(work.graph)
        for pair in values:
            rotate_values(work.graph, pair, work.generator)
        for both in scores:
            rotate_scores(work.graph, both, work.generator)
        if not values and not scores:
            return []
        return [f"v rotated in the heads of {len(values)} attentions, q and k of {len(scores)}"]


@dataclass(frozen=True)
class SubtractMeans:
    """Take means of channels out of LayerNorm outputs, keys and attention outputs, and note those of the inputs that
    are rotated next. when: auto (where some activation is coarse), all or none."""

    when: str
    hidden: RotateHidden

    def __call__(self, work: Work) -> list[str]:
        if self.when == NONE or (self.when == AUTO and not work.any_coarse()):
            return []
        edges = (f"{site.name}.input" for site in self.hidden.sites(work))
        done, means = subtract_means(work.graph, work.calibration, edges)
        work.means.update(means)
        return done


@dataclass(frozen=True)
class RotateNormOutputs:
    """Inputs of layers after a LayerNorm, rotated at run time: all or none, because the finer ones lose the residual
    stream's rotation by it. when: auto (where one of them is coarse), all or none."""

    when: str
    where = "a LayerNorm"

    def sites(self, work: Work) -> list[Site]:
        if self.when == NONE:
            return []
        graph = work.graph
        sites = [site for group in find_norm_groups(graph) for site in group.linears if alone(graph, site)]
        if self.when == AUTO and not any(work.rotates(site, AUTO) for site in sites):
            return []
        return sorted((site for site in sites if work.rotates(site, ALL)), key=lambda site: site.name)


@dataclass(frozen=True)
class RotateHidden:
    """Inputs of layers after an activation function, rotated at run time. when: auto (coarse ones), all or none."""

    when: str
    where = "an activation function"

    def sites(self, work: Work) -> list[Site]:
        return [site for site in layers_after_activations(work.graph) if work.rotates(site, self.when)]


@dataclass(frozen=True)
class RotateInputs:
    """Rotate what :class:`RotateHidden` and :class:`RotateNormOutputs` name, by Hadamard matrices with random signs."""

    kinds: tuple[RotateHidden | RotateNormOutputs, ...]

    def __call__(self, work: Work) -> list[str]:
        chosen = [(kind, kind.sites(work)) for kind in self.kinds]
        rotations: dict[int, Tensor] = {}
        for site in (site for _, sites in chosen for site in sites):
            size = rotation_size(work.graph, site)
            if size not in rotations:
                rotations[size] = hadamard(size, work.generator)
            rotate_input(work.graph, site, rotations[size], work.means.get(f"{site.name}.input"))
        return [
            f"inputs of {len(sites)} layers after {kind.where} rotated at run time" for kind, sites in chosen if sites
        ]


# -- ranges and weights -----------------------------------------------------------------------------------------------
RangeRule = Callable[[Site, Edge, EdgeView, int], Quantizer]
"""(site, edge, values, width) -> the quantizer of an activation."""


@dataclass(frozen=True)
class WeightFit:
    """Weights in closed form from second moments of the layer's inputs: fitted to the float output on quantized inputs,
    then rounded column by column, errors taken up by later columns (GPTQ). damping: λ of both, in units of the mean
    squared input. fit: True, False, or auto (where the layer's input has one scale). columns: False rounds to nearest.
    """

    damping: float = 0.1
    fit: bool | str = AUTO
    columns: bool = True

    def __call__(
        self,
        weight: Tensor,
        moments: Moments,
        own: Quantizer | None,
        grid: Callable[[Tensor], Quantizer],
        own_bias: bool,
    ) -> tuple[Tensor, Quantizer, Tensor]:
        """(the weight [out, in] before rounding, its quantizer, its values on that).

        own: the quantizer of the layer's input. grid: weight -> its quantizer. own_bias: the layer's bias takes up the
        mean error.
        """
        gram = moments.gram if own_bias else moments.second
        factor = Factor.of(gram, self.damping, gram.diagonal().argsort(descending=True))
        fit = not isinstance(own, GroupScaled) if self.fit == AUTO else self.fit
        target = ridge(weight, moments, self.damping, factor if own_bias else None) if fit else weight
        quantizer = grid(target)
        if not self.columns:
            return target, quantizer, Grid.of(quantizer).round(target)
        value = round_columns(target, gram, Grid.of(quantizer), damping=self.damping, factor=factor)
        return target, quantizer, value


class SequentialPass:
    """One pass over the calibration images: the range of every activation and the weight of every layer, each on what
    the quantized part before it makes of them."""

    def __init__(self, graph: Graph, bits: Widths, plan: Plan, ranges: RangeRule, weights: WeightFit):
        self.graph, self.bits, self.plan, self.ranges, self.weights = graph, bits, plan, ranges, weights
        self.free = {site.name for site in corrected_layers(graph)}
        """layers whose bias is their own"""
        self.names = [site.weight for site in graph.sites.of_kind("linear", "conv")]
        self.rounded = True

    def run(
        self,
        calibration: Calibration,
        *,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
        rounded: bool = True,
    ) -> None:
        """Put quantizers into the plan, with a note of what shares a scale in how many activations, and fitted weights
        and biases into the graph: rounded, or as they are before rounding."""
        self.rounded = rounded
        edges = [e for e in matmul_operand_edges(self.graph) if self.bits.of(self.graph, e) != FLOAT]
        CalibrationPass(self.graph, calibration, sequential=True, seed=seed).run(edges, self._on_edge, progress)
        self.graph.invalidate()
        kinds = [self.plan.quantizers[e.key].granularity for e in edges if not e.is_weight]
        self.plan.notes["activations"] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    def _on_edge(self, edge: Edge, view: EdgeView) -> Transform:
        width, site = self.bits.of(self.graph, edge), self.graph.sites[edge.site]
        if edge.is_weight:
            return self._weight(site, edge, view, width)
        self.plan.quantizers[edge.key] = made = self.ranges(site, edge, view, width)
        return made

    def _weight(self, site: Site, edge: Edge, view: EdgeView, width: int) -> Transform:
        weight = self.graph.tensor(str(site.weight))
        own = self.plan.quantizers.get(f"{site.name}.input")
        # a weight that two layers share is left as it is
        moments, flat, free = None, weight.flatten(1), site.name in self.free
        if self.names.count(site.weight) == 1:
            moments = layer_moments(site, weight, view.tensors(site.edges["input"]), own, network=False)
        if moments is None:
            self.plan.quantizers[edge.key] = self._grid(flat, width)
            return self.plan.quantizers[edge.key]
        target, quantizer, value = self.weights(flat, moments, own, lambda w: self._grid(w, width), free)
        self.plan.quantizers[edge.key] = quantizer
        if free:
            bias = ensure_bias(self.graph, site)
            shift = output_shift(flat, value, moments)
            self.graph.set_tensor(bias, (self.graph.tensor(bias).double() - shift).to(weight.dtype))
        value = value.reshape(weight.shape)
        self.graph.set_tensor(str(site.weight), value if self.rounded else target.reshape(weight.shape))
        return lambda _: value

    def _grid(self, weight: Tensor, width: int) -> Quantizer:
        return self.bits.weights(*mse(Observation.of(weight), width), width)
