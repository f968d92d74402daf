"""quantlens-fast: quantlens' own method of calibration and closed form alone, without training.

1. Exact transforms: outlier channels split off; coarse inputs of layers multiplied at run time by Hadamard matrices
   with random signs (QuaRot, Ashkboos et al., NeurIPS 2024), with more bits the residual stream rotated instead, at no
   cost; q with k, and v, rotated in every head; means of channels taken out. A detector at few bits keeps the means of
   keys alone: its boxes need ranges by token and small groups of channels, in convolutions too.
2. Ranges clipped where the squared error is least, on what the quantized layers before make; softmax outputs as squares
   of integers. Few bits get scales by token and group of channels, found at run time; blocks of a floating-point format
   search theirs.
3. Weights, layer by layer in closed form: fitted to the float output on quantized inputs, then rounded column by column
   (GPTQ); the bias takes up the mean error of the output.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from quantlens.calibration import (
    Calibration,
    EdgeView,
    Observation,
    affine,
    clipping,
    closest,
    group_affine,
    mse,
    subtract_means,
)
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer, SqrtSoftmax
from quantlens.graph import Edge, Graph, Site
from quantlens.methods._floating import floating_activation, floating_weight
from quantlens.methods.base import (
    FLOAT,
    MATMUL_OPERANDS,
    Method,
    MethodInfo,
    Option,
    Plan,
    Run,
    Widths,
    quantized_edges,
)
from quantlens.methods.composition import Fitted, Layer, RangeRule, fit_layers
from quantlens.reconstruction.closed_form import Factor, Moments, grid_of, output_shift, ridge, round_columns
from quantlens.transforms import (
    alone,
    ensure_bias,
    find_norm_groups,
    find_score_pairs,
    find_value_pairs,
    rotate_scores,
    rotate_values,
)
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

COARSE, NARROW, NARROW_BOXES = 6, 3, 7
"""Bits of an activation at which a rotation at run time is worth its product; and at which it is quantized dynamically,
by default; and the same in a detector."""

GROUP, GROUP_BOXES = 16, 8
"""Channels of a group, and in a detector."""

SAMPLE = 8
"""Images that the step of groups is found on."""

AUTO, ALL, NONE = "auto", "all", "none"
CHOICES = (AUTO, ALL, NONE)


@dataclass
class Work:
    """A quantization under way, as its exact transforms see and change it. means: of channels, by edge key, where a
    transform has measured them."""

    graph: Graph
    calibration: Calibration
    bits: Widths
    run: Run
    generator: torch.Generator
    means: dict[str, Tensor] = field(default_factory=dict)

    def rotated(self, sites: list[Site], wanted: str) -> list[Site]:
        """Layers whose input is rotated at run time: all that are quantized, none, or (auto) coarse ones."""
        if wanted == NONE or self.run["rotate"] == NONE:
            return []
        graph, most = self.graph, FLOAT - 1 if wanted == ALL else COARSE
        wide = [site for site in sites if rotation_size(graph, site) >= SMALLEST]
        return [site for site in wide if self.bits.of(graph, site.edges["input"]) <= most]

    def after_norms(self) -> list[Site]:
        """Rotated layers after a LayerNorm: all or none, because the finer ones lose the residual stream's rotation."""
        sites = [s for group in find_norm_groups(self.graph) for s in group.linears if alone(self.graph, s)]
        wanted = ALL if self.rotated(sites, self.run["rotate_norm_outputs"]) else NONE
        return sorted(self.rotated(sites, wanted), key=lambda site: site.name)

    def after_activations(self) -> list[Site]:
        """Rotated layers after an activation function."""
        return self.rotated(layers_after_activations(self.graph), self.run["rotate_mlp_hidden"])


ExactTransform = Callable[[Work], list[str]]
"""Rewrites the graph of a :class:`Work` exactly; returns sentences of what it did."""


def rotate_residuals(work: Work) -> list[str]:
    """Rotate residual streams at no cost, but for those whose LayerNorms' outputs are rotated at run time instead."""
    others = {site.name for site in work.after_norms()}
    residuals = [r for r in find_residuals(work.graph) if not others & {x.name for n in r.norms for x in n.linears}]
    for residual in residuals:
        rotate_residual(work.graph, residual, mean_keeping(residual.channels, work.generator))
    return [f"residual stream rotated ({len(residuals)})"] if residuals else []


def rotate_heads(work: Work) -> list[str]:
    """Rotate v with the layer that reads the context, and q with k, in every head."""
    values, scores = find_value_pairs(work.graph), find_score_pairs(work.graph)
    for value in values:
        rotate_values(work.graph, value, work.generator)
    for score in scores:
        rotate_scores(work.graph, score, work.generator)
    done = f"v rotated in the heads of {len(values)} attentions, q and k of {len(scores)}"
    return [done] if values or scores else []


def subtract_channel_means(work: Work) -> list[str]:
    """Take means of channels out of LayerNorm outputs, keys and attention outputs, and note those of the inputs that
    are rotated next."""
    when = work.run["subtract_mean"]
    activations = [e for e in quantized_edges(work.graph, work.bits) if not e.is_weight]
    coarse = any(work.bits.of(work.graph, edge) <= COARSE for edge in activations)
    if when == NONE or (when == AUTO and not coarse):
        return []
    edges = (f"{site.name}.input" for site in work.after_activations())
    done, work.means = subtract_means(work.graph, work.calibration, edges)
    return done


def rotate_inputs(work: Work) -> list[str]:
    """Rotate inputs of layers at run time, by Hadamard matrices with random signs."""
    chosen = {"an activation function": work.after_activations(), "a LayerNorm": work.after_norms()}
    rotations: dict[int, Tensor] = {}
    for site in (site for sites in chosen.values() for site in sites):
        size = rotation_size(work.graph, site)
        if size not in rotations:
            rotations[size] = hadamard(size, work.generator)
        rotate_input(work.graph, site, rotations[size], work.means.get(f"{site.name}.input"))
    return [
        f"inputs of {len(sites)} layers after {where} rotated at run time" for where, sites in chosen.items() if sites
    ]


@dataclass(frozen=True)
class WeightFit:
    """Weights in closed form from second moments of the layer's inputs: fitted to the float output on quantized inputs,
    then rounded column by column, errors taken up by later columns (GPTQ). damping: λ of both, in units of the mean
    squared input. fit: True, False, or auto (where the layer's input has one scale, and there are as many rows as
    inputs: fewer say more of their own noise than of the layer's error). columns: False rounds to nearest.
    """

    damping: float = 0.1
    fit: bool | str = AUTO
    columns: bool = True

    def __call__(
        self, layer: Layer, moments: Moments, grid: Callable[[Tensor], Quantizer]
    ) -> tuple[Tensor, Quantizer, Tensor]:
        """(the weight [out, in] before rounding, its quantizer, its values on that). grid: weight -> its quantizer."""
        target, gram = layer.weight, moments.gram if layer.free else moments.second
        factor = Factor.of(gram, self.damping, gram.diagonal().argsort(descending=True))
        told = moments.count >= len(gram) and getattr(layer.own, "granularity", "") != "group"
        if self.fit is True or (self.fit == AUTO and told):
            target = ridge(target, moments, self.damping, factor if layer.free else None)
        quantizer = grid(target.reshape(layer.stored.shape))
        levels = grid_of(quantizer, layer.stored)
        if not self.columns:
            return target, quantizer, levels.round(target)
        return target, quantizer, round_columns(target, gram, levels, damping=self.damping, factor=factor)


def activation_quantizer(
    run: Run, site: Site, edge: Edge, view: EdgeView, width: int, *, boxes: bool = False
) -> Quantizer:
    """Softmax outputs as squares, others clipped where the squared error is least: per tensor, or dynamically per token
    and group of channels where that error is smaller. boxes: whether the model is a detector."""
    is_softmax, granularity = edge.key.endswith(".probs.output"), run["activation_granularity"]
    if is_softmax and run["softmax"] == "sqrt":
        return SqrtSoftmax(width)
    uniform = affine(*clipping(view(), width), width)
    dynamic = granularity == "group" or (granularity == AUTO and width <= (NARROW_BOXES if boxes else NARROW))
    if is_softmax or not dynamic or (site.kind == "conv" and not boxes):
        return uniform
    # a product sums over the first dimension of its second operand: keys are [..., channels, tokens]
    axis = -3 if site.kind == "conv" else -2 if edge.name == "k" else -1
    values = view.tensors()[0][:SAMPLE]
    channels = values.shape[axis]
    size = min(run["group_size"] or (GROUP_BOXES if boxes else GROUP), channels & -channels)
    if size < SMALLEST:
        return uniform
    return closest((uniform, group_affine(values, width, size, axis=axis)), values)


class QuantlensFast(Method):
    info = MethodInfo(
        name="quantlens-fast",
        title="quantlens-fast",
        paper="quantlens: rotations that commute with LayerNorm, clipped ranges, weights fitted in closed form",
        venue="quantlens",
        year=2026,
        url="docs/methods.md",
        quantizes=MATMUL_OPERANDS,
        version=11,
        summary="exact rotations, clipped ranges, weights fitted and rounded in closed form on quantized inputs",
        aliases=("fast",),
        floating=True,
        arguments={"outlier_channels": "split"},
        options={
            "rotate": Option(ALL, "rotations: all (as the next two options say) or none", (ALL, NONE)),
            "rotate_norm_outputs": Option(
                AUTO,
                "LayerNorm outputs rotated at run time, in place of the residual stream at no cost: auto (where one of "
                f"them has {COARSE} bits or fewer), all or none",
                CHOICES,
            ),
            "rotate_mlp_hidden": Option(
                AUTO,
                f"inputs of layers after an activation function, rotated at run time: auto (where they have {COARSE} "
                "bits or fewer), all or none",
                CHOICES,
            ),
            "subtract_mean": Option(
                AUTO,
                "means of channels taken out of LayerNorm outputs, keys, attention outputs and rotated MLP inputs: "
                f"auto (where an activation has {COARSE} bits or fewer), all or none",
                CHOICES,
            ),
            "activation_granularity": Option(
                AUTO,
                "what shares a scale of an activation: tensor (static), group (dynamic, per token and group of "
                f"channels), or auto (group where it has {NARROW} bits or fewer, in a detector {NARROW_BOXES})",
                (AUTO, "tensor", "group"),
            ),
            "group_size": Option(
                None,
                f"channels of a group, at most: a power of two (None: {GROUP}, in a detector {GROUP_BOXES})",
                type="int",
                least=SMALLEST,
            ),
            "softmax": Option(
                "sqrt",
                "softmax outputs: sqrt (squares of the codes, every row by its own peak and sum) or uniform",
                ("sqrt", "uniform"),
            ),
            "damping": Option(0.1, "damping of the weight fit, in units of the mean squared input", above=0),
        },
    )

    def transforms(self, run: Run) -> list[ExactTransform]:
        """The exact transforms, in the order in which they are applied."""
        if run["rotate"] == NONE:
            return [subtract_channel_means]
        return [rotate_residuals, rotate_heads, subtract_channel_means, rotate_inputs]

    def ranges(self, graph: Graph, run: Run) -> RangeRule:
        """How an activation is quantized."""
        return partial(activation_quantizer, run, boxes=graph.boxes is not None)

    def weight_fit(self, run: Run) -> WeightFit:
        """How a weight is fitted and rounded."""
        return WeightFit(run["damping"])

    def rewrite(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> list[str]:
        """Apply the transforms; returns one sentence per kind."""
        activations = (edge for edge in quantized_edges(graph, bits) if not edge.is_weight)
        narrow = any(bits.of(graph, edge) <= NARROW_BOXES for edge in activations)
        if graph.boxes is not None and narrow and run["activation_granularity"] != "tensor":
            keys = run["subtract_mean"] != NONE
            return subtract_means(graph, calibration, only_keys=True)[0] if keys else []
        work = Work(graph, calibration, bits, run, torch.Generator().manual_seed(run.seed))
        done: list[str] = []
        for transform in self.transforms(run):
            done += transform(work)
            graph.invalidate()
        return done

    def calibrate(
        self, graph: Graph, calibration: Calibration, bits: Widths, plan: Plan, run: Run
    ) -> dict[str, Tensor]:
        """Ranges and weights in one pass; returns what weights were rounded from, by name."""
        unrounded: dict[str, Tensor] = {}
        fit_weight, names = self.weight_fit(run), [site.weight for site in graph.sites.of_kind("linear", "conv")]

        def fit(layer: Layer) -> Fitted:
            def grid(weight: Tensor) -> Quantizer:
                edge = layer.site.edges["weight"]
                name = bits.format_of(graph, edge)
                if name:
                    return floating_weight(name, layer.site, edge, weight, search=True)
                weight = weight.flatten(1)
                return bits.weights(*mse(Observation.of(weight), layer.width), layer.width)

            # a weight that two layers share is left as it is
            moments = layer.moments(network=False) if names.count(layer.site.weight) == 1 else None
            if moments is None:
                return Fitted(grid(layer.stored))
            target, quantizer, value = fit_weight(layer, moments, grid)
            if layer.free:  # at once: the layers after it see it
                bias, shift = ensure_bias(graph, layer.site), output_shift(layer.weight, value, moments)
                graph.set_tensor(bias, (graph.tensor(bias).double() - shift).to(value.dtype))
            unrounded[str(layer.site.weight)] = target
            return Fitted(quantizer, value)

        rule = self.ranges(graph, run)

        def ranges(site: Site, edge: Edge, view: EdgeView, width: int) -> Quantizer:
            name = bits.format_of(graph, edge)
            return floating_activation(name, site, edge, view, search=True) if name else rule(site, edge, view, width)

        fit_layers(graph, calibration, bits, plan, fit, run, sequential=True, ranges=ranges)
        kinds = [plan.quantizers[e.key].granularity for e in quantized_edges(graph, bits) if not e.is_weight]
        plan.notes["activations"] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
        return unrounded

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        size = run["group_size"] or GROUP
        if size & (size - 1):
            raise QuantlensError(
                f"quantlens-fast: group_size={size}; give a power of two from {SMALLEST} on, such as {GROUP}"
            )
        plan = Plan({}, self.rewrite(graph, calibration, bits, run))
        self.calibrate(graph, calibration, bits, plan, run)
        return plan
