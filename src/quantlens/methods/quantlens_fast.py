"""quantlens-fast: quantlens' own method of calibration and closed form alone, without training.

1. Exact transforms. Outlier channels after an activation function get a linear layer of their own. Coarse activations
   (6 bits or fewer) that layers read after a LayerNorm or a GELU are multiplied at run time by Hadamard matrices of 64
   channels with random signs (QuaRot, Ashkboos et al., NeurIPS 2024), which the layer's weight undoes; with more bits
   the residual stream is rotated instead, at no cost, by a matrix that keeps the vector of ones and so commutes with
   LayerNorm. q with k, and v with the layer after it, are rotated in every head. Means of channels are taken out of all
   that a bias can give them back to.
2. Ranges. Activations are clipped where the squared error is least, on what the quantized layers before make of them.
   Softmax outputs are squares of integers, every row by its own peak and sum. Activations of 3 bits or fewer are
   quantized dynamically, per token and group of 64 channels, where that has the smaller squared error.
3. Weights, layer by layer in closed form: fitted to the float output on quantized inputs, then rounded column by column
   (GPTQ); the bias takes up the mean error of the output.
"""

from __future__ import annotations

import torch

from quantlens.calibration import Calibration, EdgeView
from quantlens.calibration.ranges import affine, block_scaled, clipping
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer, SqrtSoftmax, Uniform
from quantlens.graph import Edge, Graph
from quantlens.graph.sites import Site
from quantlens.methods.base import MATMUL_OPERANDS, Method, MethodInfo, Option, Run, Widths
from quantlens.methods.composition import (
    ALL,
    AUTO,
    COARSE,
    NONE,
    ExactTransform,
    RangeRule,
    RotateHeads,
    RotateHidden,
    RotateInputs,
    RotateNormOutputs,
    RotateResidual,
    SequentialPass,
    SubtractMeans,
    WeightFit,
    Work,
    apply,
)
from quantlens.qmodel import Plan
from quantlens.transforms.rotation import LARGEST, SMALLEST

NARROW = 3
"""Bits at which an activation is quantized dynamically by default."""

SAMPLE = 8
"""Images that the step of groups is found on."""

CHOICES = (AUTO, ALL, NONE)


class QuantlensFast(Method):
    info = MethodInfo(
        name="quantlens-fast",
        title="quantlens-fast",
        paper="quantlens: rotations that commute with LayerNorm, clipped ranges, weights fitted in closed form",
        venue="quantlens",
        year=2026,
        url="docs/methods.md",
        quantizes=MATMUL_OPERANDS,
        version=6,
        summary="exact rotations, clipped ranges, weights fitted and rounded in closed form on quantized inputs",
        aliases=("fast",),
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
                f"channels), or auto (group where it has {NARROW} bits or fewer)",
                (AUTO, "tensor", "group"),
            ),
            "group_size": Option(LARGEST, "channels of a group, at most: a power of two"),
            "softmax": Option(
                "sqrt",
                "softmax outputs: sqrt (squares of the codes, every row by its own peak and sum) or uniform",
                ("sqrt", "uniform"),
            ),
            "damping": Option(0.1, "damping of the weight fit, in units of the mean squared input"),
        },
    )

    def transforms(self, run: Run) -> list[ExactTransform]:
        """The exact transforms, in the order in which they are applied."""
        off = run["rotate"] == NONE
        norms = RotateNormOutputs(NONE if off else run["rotate_norm_outputs"])
        hidden = RotateHidden(NONE if off else run["rotate_mlp_hidden"])
        means = SubtractMeans(run["subtract_mean"], hidden)
        return [means] if off else [RotateResidual(norms), RotateHeads(), means, RotateInputs((hidden, norms))]

    def ranges(self, run: Run) -> RangeRule:
        """How an activation is quantized."""
        return Ranges(run["activation_granularity"], int(run["group_size"]), run["softmax"])

    def weight_fit(self, run: Run) -> WeightFit:
        """How a weight is fitted and rounded."""
        return WeightFit(float(run["damping"]))

    def rewrite(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> list[str]:
        """Apply the transforms; returns one sentence per kind."""
        return apply(self.transforms(run), Work(graph, calibration, bits, torch.Generator().manual_seed(run.seed)))

    def calibrate(
        self, graph: Graph, calibration: Calibration, bits: Widths, plan: Plan, run: Run, *, rounded: bool = True
    ) -> None:
        """Ranges and weights in one pass. rounded: put rounded weights into the graph, or as they are before that."""
        fit = SequentialPass(graph, bits, plan, self.ranges(run), self.weight_fit(run))
        fit.run(calibration, seed=run.seed, progress=run.progress, rounded=rounded)

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        check(run)
        plan = Plan({}, self.rewrite(graph, calibration, bits, run))
        self.calibrate(graph, calibration, bits, plan, run)
        return plan


def check(run: Run) -> None:
    """Raises QuantlensError for options out of range."""
    if not float(run["damping"]) > 0:
        raise QuantlensError(f"quantlens-fast: damping={run['damping']}; give a number above 0, such as 0.1")
    size = run["group_size"]
    if not isinstance(size, int) or size < SMALLEST or size & (size - 1):
        raise QuantlensError(
            f"quantlens-fast: group_size={size}; give a power of two from {SMALLEST} on, such as {LARGEST}"
        )


class Ranges:
    """The quantizer of an activation: softmax outputs as squares, others clipped where the squared error is least, per
    tensor or dynamically per token and group."""

    def __init__(self, granularity: str, group_size: int, softmax: str):
        self.granularity, self.group_size, self.softmax = granularity, group_size, softmax

    def __call__(self, site: Site, edge: Edge, view: EdgeView, width: int) -> Quantizer:
        if edge.key.endswith(".probs.output"):
            return SqrtSoftmax(width) if self.softmax == "sqrt" else affine(*clipping(view(), width), width)
        uniform = affine(*clipping(view(), width), width)
        dynamic = self.granularity == "group" or (self.granularity == AUTO and width <= NARROW)
        return self._grouped(edge, view, uniform) if dynamic and site.kind != "conv" else uniform

    def _grouped(self, edge: Edge, view: EdgeView, uniform: Uniform) -> Quantizer:
        """Groups of channels with dynamic scales, where their squared error is smaller than that of ``uniform``."""
        # a product sums over the first dimension of its second operand: keys are [..., channels, tokens]
        axis = -2 if edge.name == "k" else -1
        values = view.tensors()[0][:SAMPLE]
        channels = values.shape[axis]
        size = min(self.group_size, channels & -channels)
        if size < SMALLEST:
            return uniform
        groups = block_scaled(values, uniform.bits, size, axis=axis)
        return min((uniform, groups), key=lambda q: float((q(values) - values).square_().sum()))
