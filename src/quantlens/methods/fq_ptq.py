"""fq-ptq: FQ-ViT, post-training quantization for fully quantized vision transformers (Lin et al., IJCAI 2022).

Every tensor is quantized, LayerNorm, softmax, GELU inputs and residual sums included, so that a model runs in integers
from pixels to logits:

* LayerNorm inputs, whose channels differ in range by far, get power-of-two factors (section 3.2, eq. 8 and 9): one
  scale and zero point for the tensor, and per channel a shift with the least squared error. LayerNorm then runs on
  integers (:class:`~quantlens.formats.IntegerLayerNorm`).
* softmax runs on integers too, with I-BERT's exponential, and puts out powers of two (section 3.3, Log-Int-Softmax;
  :class:`~quantlens.formats.LogIntSoftmax`).
* everything else: activations per tensor, asymmetric uniform, min-max ranges; weights per output channel, symmetric, s
  = max|w|/(2ᵇ⁻¹ − ½).

All ranges are those of the float model. Biases, γ, β, class token and position embedding are constants of the
accumulators that they are added to and are not quantized by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quantlens.calibration import Calibration, CalibrationPass, EdgeView, Observation
from quantlens.calibration.ranges import affine
from quantlens.calibration.ranges.power_of_two import power_of_two_factors
from quantlens.errors import QuantlensError
from quantlens.formats import (
    IntegerLayerNorm,
    Log,
    LogIntSoftmax,
    MaskedSoftmax,
    Operator,
    PowerOfTwo,
    Quantizer,
    Uniform,
)
from quantlens.graph import Edge, Graph
from quantlens.graph.graph import VIEWS, op_name
from quantlens.graph.layout import axes_of_last
from quantlens.graph.sites import SCALINGS, Site
from quantlens.methods.base import EVERYTHING, Departure, Method, MethodInfo, Option, Run, Widths, everything_edges
from quantlens.qmodel import Plan
from quantlens.qmodel.bits import FLOAT

MASKED = 50.0
"""An entry of the attention this far below its row's largest is masked."""


class FQViT(Method):
    info = MethodInfo(
        name="fq-ptq",
        title="FQ-ViT",
        paper="FQ-ViT: Post-Training Quantization for Fully Quantized Vision Transformer",
        venue="IJCAI",
        year=2022,
        url="https://arxiv.org/abs/2111.13824",
        quantizes=EVERYTHING,
        summary="fully quantized: power-of-two factors for LayerNorm inputs, integer LayerNorm, log-int-softmax",
        departures=(
            Departure(
                "sums",
                True,
                False,
                "power-of-two factors on all that LayerNorms and sums read; the paper's: LayerNorms",
            ),
            Departure("largest_exponent", 7, 3, "K of the power-of-two factors 2^0 to 2^K"),
            Departure(
                "zero_points",
                8,
                1,
                "the best of so many zero points of power-of-two factors; 1: that of the whole range",
            ),
        ),
        readings=(
            "calibration images: as many as are given, theirs 10 batches of 100; ranges are the whole ones (min-max), "
            "as for the paper's FQ-ViT",
            "errors of exponents are measured on samples of all images, not on the last batch",
            "zero is taken into every range, where theirs clamps zero points and cuts off values; not at the softmax's "
            "input, whose zero point cancels",
            "integer LayerNorm: one multiplier per channel, rounded to nearest; sigma = 0 gives beta, theirs NaN",
            "integer exponential on a grid of 2^-8, where theirs takes the softmax input's; n is 20, not 30",
            "log2: zero is one of the 2^b codes, where theirs has 2^b powers and zero",
            "masked attention: code 0 is kept for masked entries (50 below their row's largest), with probability 0",
            "the softmax's output has the width of other activations (softmax_bits=4 for 8/8/4); pixels have 8 bits",
            "where a width is 32, LayerNorm and softmax stay in float, too",
        ),
        aliases=("fq-vit", "fqvit", "fq"),
        options={
            "lis": Option(
                True, "log-int-softmax (False: float softmax with uniform codes of its output)", (True, False)
            ),
            "softmax_bits": Option(
                None, "width of the softmax's output, 2 to 16 (None: as other activations)", type="int"
            ),
            "integer_layernorm": Option(
                True, "LayerNorm on integers (False: in float, between quantizers)", (True, False)
            ),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        softmax_bits = None if run["softmax_bits"] is None else _softmax_bits(run["softmax_bits"])
        tensors = [Shared.of(graph, group, bits, softmax_bits) for group in everything_edges(graph)]
        chosen = _Choice(graph, bits, run, [tensor for tensor in tensors if tensor.width != FLOAT])
        CalibrationPass(graph, calibration, sequential=False, seed=run.seed).run(
            chosen.edges(), chosen.on_edge, run.progress
        )
        quantizers, operators = chosen.quantizers, integer_operators(graph, chosen, run)
        for name in operators:
            del quantizers[f"{name}.output"]  # the operator puts out values on that grid
        order = {key: i for i, key in enumerate(graph.sites.edges)}
        return Plan({k: quantizers[k] for k in sorted(quantizers, key=order.__getitem__)}, operators=operators)


class _Choice:
    """The quantizer of every edge, chosen as the walk shows its values; and the softmaxes whose input is masked."""

    def __init__(self, graph: Graph, bits: Widths, run: Run, tensors: list[Shared]):
        self.graph, self.bits, self.run = graph, bits, run
        self.tensors = {edge.key: tensor for tensor in tensors for edge in tensor.edges}
        self.quantizers: dict[str, Quantizer] = {}
        self.masked: set[str] = set()

    def edges(self) -> list[Edge]:
        """What is quantized: activations of a width, then weights."""
        layers = self.graph.sites.of_kind("linear", "conv")
        weights = [site.edges["weight"] for site in layers]
        return [
            *(tensor.edge(key) for key, tensor in self.tensors.items()),
            *(edge for edge in weights if self.bits.of(self.graph, edge) != FLOAT),
        ]

    def on_edge(self, edge: Edge, view: EdgeView) -> None:
        """Choose the quantizer of one edge; edges that carry one tensor share one."""
        if edge.is_weight:
            self.quantizers[edge.key] = symmetric_weight(view(axis=0), self.bits.of(self.graph, edge))
            return
        tensor = self.tensors[edge.key]
        if edge is not tensor.edges[0]:
            self.quantizers[edge.key] = self.quantizers[tensor.edges[0].key]
        elif self.graph.sites[edge.site].kind == "probs" and edge.position is not None:
            quantizer, has_mask = softmax_input(view.tensors(), tensor.width)
            self.quantizers[edge.key] = quantizer
            if has_mask:
                self.masked.add(edge.site)
        elif self.graph.sites[edge.site].kind == "probs" and self.run["lis"]:
            self.quantizers[edge.key] = Log(torch.tensor(1.0, device=self.graph.device), tensor.width, steps=1)
        else:
            self.quantizers[edge.key] = self._activation(tensor, view)

    def _activation(self, tensor: Shared, view: EdgeView) -> Quantizer:
        """Power-of-two factors per channel where they cost nothing, else one scale for the tensor."""
        run, axis = self.run, tensor.channel_axis(sums=self.run["sums"])
        if axis is None:
            seen = view()
            return affine(*with_zero(seen.low, seen.high), tensor.width)
        return power_of_two_factors(
            view(axis=axis), tensor.width, largest=run["largest_exponent"], zero_points=run["zero_points"], axis=axis
        )


# -- which tensors -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shared:
    """A tensor with one quantizer: the edges that carry it, the sites that read it, and its width."""

    edges: tuple[Edge, ...]
    readers: tuple[tuple[Site, fx.Node], ...]
    """Each with the node whose value it reads."""
    width: int

    @classmethod
    def of(cls, graph: Graph, edges: tuple[Edge, ...], bits: Widths, softmax_bits: int | None) -> Shared:
        readers: list[tuple[Site, fx.Node]] = []
        for edge in edges:
            if edge.position is None:
                readers += _readers(graph, edge.node)
            else:
                readers.append((graph.sites[edge.site], edge.value))
        first = edges[0]
        width = bits.of(graph, first)
        heads = {site.name for site in graph.sites.head}
        if readers and all(site.name in heads for site, _ in readers):
            width = bits.of(graph, readers[0][0].edges["input"])
        if graph.sites[first.site].kind == "probs" and first.position is None and width != FLOAT:
            width = width if softmax_bits is None else softmax_bits
        return cls(edges, tuple(readers), width)

    def edge(self, key: str) -> Edge:
        return next(e for e in self.edges if e.key == key)

    def channel_axis(self, *, sums: bool) -> int | None:
        """The dimension of the tensor (negative) that LayerNorms (``sums``: LayerNorms and sums) read as their last,
        its channels, if LayerNorms and sums are all that reads it; else None."""
        kinds = {site.kind for site, _ in self.readers}
        nodes = [node for site, node in self.readers if site.kind == "layer_norm" or sums]
        if not nodes or not kinds <= {"layer_norm", "add"}:
            return None
        sources = {edge.value for edge in self.edges}
        shapes = {tuple(source.meta["shape"]) for source in sources}
        if len(shapes) > 1:
            return None
        axes = [axes_of_last(sources, node) for node in nodes]
        return next((axis for axis in (-1, 1 - len(shapes.pop())) if all(axis in found for found in axes)), None)


def _readers(graph: Graph, node: fx.Node) -> list[tuple[Site, fx.Node]]:
    """Sites that read a value through operations that move it or multiply it by one number."""
    by_node = {site.node: site for site in graph.sites}
    found: list[tuple[Site, fx.Node]] = []
    queue = [node]
    while queue:
        value = queue.pop()
        for user in value.users:
            if user in by_node:
                found.append((by_node[user], value))
            elif op_name(user) in VIEWS or op_name(user) in SCALINGS:
                queue.append(user)
    return found


# -- ranges -------------------------------------------------------------------------------------------------------
def with_zero(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The range with zero taken in, so that the zero point is one of the codes."""
    return low.clamp_max(0.0), high.clamp_min(0.0)


def softmax_input(pieces: Sequence[Tensor], bits: int) -> tuple[Uniform, bool]:
    """The quantizer in front of a softmax, and whether attention is masked there.

    pieces: [..., k] values after bias and mask, softmax over the last dimension. If some entries are masked, code 0 is
    theirs and the range of the others begins at code 1.
    """
    kept, has_mask = [], False
    for piece in pieces:
        if bool(piece.isnan().any()):
            raise QuantlensError("attention scores are NaN; check the weights and the calibration images")
        seen = piece >= piece.amax(-1, keepdim=True) - MASKED
        complete = bool(seen.all())
        kept.append((piece if complete else piece[seen]).reshape(1, -1))
        has_mask |= not complete
    low = torch.stack([p.amin() for p in kept]).amin().reshape(1)
    high = torch.stack([p.amax() for p in kept]).amax().reshape(1)
    if has_mask:
        low = low - (high - low) / (2**bits - 2)
    return affine(low, high, bits), has_mask


def symmetric_weight(seen: Observation, bits: int) -> Uniform:
    """Signed codes per output channel, s = max|w|/(2ᵇ⁻¹ − ½), as in the authors' code."""
    magnitude = torch.maximum(seen.low.abs(), seen.high.abs())
    scale = magnitude / (2 ** (bits - 1) - 0.5)
    scale = torch.where(scale > torch.finfo(torch.float32).tiny * 4, scale, torch.ones_like(scale))
    return Uniform(scale, None, bits, signed=True, granularity="channel", axis=0)


# -- operators ----------------------------------------------------------------------------------------------------
def integer_operators(graph: Graph, chosen: _Choice, run: Run) -> dict[str, Operator]:
    """Operators by site name: integer LayerNorms and softmaxes, and float softmaxes over masked entries."""
    quantizers, operators = chosen.quantizers, {}
    for site in graph.sites.of_kind("layer_norm"):
        if run["integer_layernorm"] and (made := integer_layer_norm(graph, site, quantizers)) is not None:
            operators[site.name] = made
    for site in graph.sites.of_kind("probs"):
        if (softmax := integer_softmax(site, quantizers, masked=site.name in chosen.masked)) is not None:
            operators[site.name] = softmax
    return operators


def integer_softmax(site: Site, quantizers: dict[str, Quantizer], *, masked: bool) -> Operator | None:
    """The operator in a softmax's place; None where its input or output is not quantized, or nothing is special."""
    source, output = quantizers.get(f"{site.name}.input"), quantizers.get(f"{site.name}.output")
    if not isinstance(source, Uniform) or output is None:
        return None
    lowest = source.decode(torch.zeros((), dtype=torch.int32, device=source.scale.device)) if masked else None
    if isinstance(output, Log):
        return LogIntSoftmax(source.scale, 2**source.bits, output.bits, lowest=lowest)
    return None if lowest is None else MaskedSoftmax(source.scale, lowest, output)


def integer_layer_norm(graph: Graph, site: Site, quantizers: dict[str, Quantizer]) -> IntegerLayerNorm | None:
    """The integer LayerNorm for a site, None where it stays in float: an unquantized side, several dimensions."""
    output, found = quantizers.get(f"{site.name}.output"), _quantizer_of(graph, site.edges["input"], quantizers)
    shape = site.node.args[1]
    if found is None or not isinstance(output, Uniform | PowerOfTwo) or len(shape) != 1:  # type: ignore[arg-type]
        return None
    source, factor = found
    if not isinstance(source, Uniform | PowerOfTwo) or source.scale.dim() != 0 or factor == 0:
        return None
    args = [*site.node.args[2:5], None, None, None]
    gamma, beta = graph.constant(args[0]), graph.constant(args[1])
    ones = torch.ones(shape[0], device=graph.device)  # type: ignore[index]
    if (gamma is None and args[0] is not None) or (beta is None and args[1] is not None):
        return None
    eps = float(args[2]) if args[2] is not None else float(site.node.kwargs.get("eps", 1e-5))  # type: ignore[arg-type]
    return IntegerLayerNorm.of(
        source.scale * abs(factor),
        ones if gamma is None else gamma,
        ones * 0 if beta is None else beta,
        eps,
        output,
    )


def _quantizer_of(graph: Graph, edge: Edge, quantizers: dict[str, Quantizer]) -> tuple[Quantizer, float] | None:
    """The quantizer of the value that crosses an edge and the number it was multiplied by since; None if there is
    none."""
    if edge.key in quantizers:
        return quantizers[edge.key], 1.0
    by_node = {site.node: site for site in graph.sites}
    value, factor = edge.value, 1.0
    while value not in by_node:
        if op_name(value) in SCALINGS:
            number = float(value.args[1])  # type: ignore[arg-type]
            factor = factor / number if "div" in op_name(value) else factor * number
        elif op_name(value) not in VIEWS:
            return None
        value = value.args[0]  # type: ignore[assignment]
    found = quantizers.get(f"{by_node[value].name}.output")
    return None if found is None else (found, factor)


def _softmax_bits(value: object) -> int:
    if not isinstance(value, int) or not 2 <= value <= 16:
        raise QuantlensError(f"fq-ptq: softmax_bits={value!r}; give a whole number from 2 to 16")
    return value
