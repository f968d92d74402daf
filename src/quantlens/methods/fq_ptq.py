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

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from quantlens.calibration import Calibration, CalibrationPass, EdgeView, Observation, affine, power_of_two_factors
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
from quantlens.graph import SCALINGS, VIEWS, Site, argument, axes_of_last, op_name
from quantlens.methods.base import (
    EVERYTHING,
    FLOAT,
    Departure,
    Edge,
    Graph,
    Method,
    MethodInfo,
    Option,
    Plan,
    Run,
    Widths,
    everything_edges,
    readers,
)

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
            "all ranges are those of the float model; in the authors' last calibration batch the softmax already puts "
            "out powers of two, and the ranges after it are those of a model with such a softmax",
            "the last LayerNorm's output is quantized with all its tokens; theirs is the class token alone",
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
                None,
                "width of the softmax's output, 2 to 16 (None: as other activations)",
                type="int",
                least=2,
                most=16,
            ),
            "integer_layernorm": Option(
                True, "LayerNorm on integers (False: in float, between quantizers)", (True, False)
            ),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        widths = {group: tensor_width(graph, group, bits, run["softmax_bits"]) for group in everything_edges(graph)}
        groups = {group[0].key: group for group, width in widths.items() if width != FLOAT}
        plan, masked = Plan(), set[str]()

        def on_edge(edge: Edge, view: EdgeView) -> None:
            """Choose the quantizer of a weight, or of all edges that carry one tensor."""
            if edge.is_weight:
                plan.quantizers[edge.key] = symmetric_weight(view(axis=0), bits.of(graph, edge))
                return
            group, is_softmax = groups[edge.key], graph.sites[edge.site].kind == "probs"
            width, axis = widths[group], channel_axis(graph, group, sums=run["sums"])
            if is_softmax and edge.position is not None:
                made, has_mask = softmax_input(view.tensors(), width)
                if has_mask:
                    masked.add(edge.site)
            elif is_softmax and run["lis"]:
                made = Log(torch.tensor(1.0, device=graph.device), width, steps=1)
            elif axis is None:
                seen = view()  # zero is taken in, so that the zero point is one of the codes
                made = affine(seen.low.clamp_max(0.0), seen.high.clamp_min(0.0), width)
            else:
                largest, zero_points = run["largest_exponent"], run["zero_points"]
                made = power_of_two_factors(view(axis=axis), width, largest=largest, zero_points=zero_points, axis=axis)
            plan.quantizers |= {e.key: made for e in group}

        weights = [site.edges["weight"] for site in graph.sites.of_kind("linear", "conv")]
        edges = [*(group[0] for group in groups.values()), *(e for e in weights if bits.of(graph, e) != FLOAT)]
        CalibrationPass(graph, calibration, sequential=False, seed=run.seed).run(edges, on_edge, run.progress)
        plan.operators = integer_operators(graph, plan.quantizers, masked, run)
        for name in plan.operators:
            del plan.quantizers[f"{name}.output"]  # the operator puts out values on that grid
        return plan


# -- which tensors -------------------------------------------------------------------------------------------------
def tensor_readers(graph: Graph, edges: tuple[Edge, ...]) -> list[tuple[Site, fx.Node]]:
    """Sites that read a tensor that ``edges`` carry, each with the node whose value it reads."""
    by_node = graph.sites.by_node
    found = [(by_node[e.node], e.value) for e in edges if e.position is not None]
    made = [pair for e in edges if e.position is None for pair in readers(graph, e.node)]
    return found + [(by_node[node], value) for node, value in made if node in by_node]


def tensor_width(graph: Graph, edges: tuple[Edge, ...], bits: Widths, softmax_bits: int | None) -> int:
    """Bits of a tensor: what the classifier alone reads has the classifier's, softmax outputs may have their own."""
    heads = {site.name for site in graph.sites.head}
    sites = [site for site, _ in tensor_readers(graph, edges)]
    by_head = bool(sites) and all(site.name in heads for site in sites)
    width = bits.of(graph, sites[0].edges["input"] if by_head else edges[0])
    is_probs = graph.sites[edges[0].site].kind == "probs" and edges[0].position is None
    return softmax_bits if is_probs and softmax_bits is not None and width != FLOAT else width


def channel_axis(graph: Graph, edges: tuple[Edge, ...], *, sums: bool) -> int | None:
    """The dimension of a tensor (negative) that LayerNorms (``sums``: LayerNorms and sums) read as their last, its
    channels, if LayerNorms and sums are all that reads it; else None."""
    found = tensor_readers(graph, edges)
    nodes = [node for site, node in found if site.kind == "layer_norm" or sums]
    sources = {edge.value for edge in edges}
    shapes = {tuple(source.meta["shape"]) for source in sources}
    if not nodes or len(shapes) > 1 or not {site.kind for site, _ in found} <= {"layer_norm", "add"}:
        return None
    axes = [axes_of_last(sources, node) for node in nodes]
    return next((axis for axis in (-1, 1 - len(shapes.pop())) if all(axis in found for found in axes)), None)


# -- ranges -------------------------------------------------------------------------------------------------------
def softmax_input(pieces: Sequence[Tensor], bits: int) -> tuple[Uniform, bool]:
    """The quantizer in front of a softmax, and whether attention is masked there.

    pieces: [..., k] values after bias and mask, softmax over the last dimension. If some entries are masked, code 0 is
    theirs and the range of the others begins at code 1.
    """
    ends, has_mask = [], False
    for piece in pieces:
        if bool(piece.isnan().any()):
            raise QuantlensError("attention scores are NaN; check the weights and the calibration images")
        seen = piece[piece >= piece.amax(-1, keepdim=True) - MASKED]
        ends.append(torch.stack(seen.aminmax()))
        has_mask |= seen.numel() < piece.numel()
    low, high = torch.stack(ends).amin(0)[:1], torch.stack(ends).amax(0)[1:]
    if has_mask:
        low = low - (high - low) / (2**bits - 2)
    return affine(low, high, bits), has_mask


def symmetric_weight(seen: Observation, bits: int) -> Uniform:
    """Signed codes per output channel, s = max|w|/(2ᵇ⁻¹ − ½), as in the authors' code."""
    scale = torch.maximum(seen.low.abs(), seen.high.abs()) / (2 ** (bits - 1) - 0.5)
    scale = torch.where(scale > torch.finfo(torch.float32).tiny * 4, scale, torch.ones_like(scale))
    return Uniform(scale, None, bits, signed=True, granularity="channel", axis=0)


# -- operators ----------------------------------------------------------------------------------------------------
def integer_operators(
    graph: Graph, quantizers: dict[str, Quantizer], masked: set[str], run: Run
) -> dict[str, Operator]:
    """Operators by site name: integer LayerNorms and softmaxes, and float softmaxes over masked entries."""
    norms = graph.sites.of_kind("layer_norm") if run["integer_layernorm"] else []
    softmaxes = graph.sites.of_kind("probs")
    made: dict[str, Operator | None] = {site.name: integer_layer_norm(graph, site, quantizers) for site in norms}
    made |= {site.name: integer_softmax(site, quantizers, masked=site.name in masked) for site in softmaxes}
    return {name: operator for name, operator in made.items() if operator is not None}


def integer_softmax(site: Site, quantizers: dict[str, Quantizer], *, masked: bool) -> Operator | None:
    """The operator in a softmax's place; None where its input or output is not quantized, or nothing is special, and
    for a clipped softmax."""
    source, output = quantizers.get(f"{site.name}.input"), quantizers.get(f"{site.name}.output")
    if not isinstance(source, Uniform) or output is None or site.edges["output"].node is not site.node:
        return None
    lowest = source.decode(torch.zeros((), dtype=torch.int32, device=source.scale.device)) if masked else None
    if isinstance(output, Log):
        return LogIntSoftmax(source.scale, 2**source.bits, output.bits, lowest=lowest)
    return None if lowest is None else MaskedSoftmax(source.scale, lowest, output)


def integer_layer_norm(graph: Graph, site: Site, quantizers: dict[str, Quantizer]) -> IntegerLayerNorm | None:
    """The integer LayerNorm for a site, None where it stays in float: an unquantized side, several dimensions, a scale
    or shift that is computed."""
    output, (source, factor) = quantizers.get(f"{site.name}.output"), _quantizer_of(graph, site, quantizers)
    if not isinstance(output, Uniform | PowerOfTwo) or not isinstance(source, Uniform | PowerOfTwo):
        return None
    shape = argument(site.node, "normalized_shape")
    given = [argument(site.node, name) for name in ("weight", "bias")]
    gamma, beta = (graph.constant(value) for value in given)
    computed = (gamma is None and given[0] is not None) or (beta is None and given[1] is not None)
    if len(shape) != 1 or source.scale.dim() != 0 or factor == 0 or computed:
        return None
    gamma = torch.ones(shape[0], device=graph.device) if gamma is None else gamma
    beta = torch.zeros(shape[0], device=graph.device) if beta is None else beta
    return IntegerLayerNorm.of(source.scale * abs(factor), gamma, beta, float(argument(site.node, "eps")), output)


def _quantizer_of(graph: Graph, site: Site, quantizers: dict[str, Quantizer]) -> tuple[Quantizer | None, float]:
    """The quantizer of a LayerNorm's input (None: there is none) and the number that its values were multiplied by."""
    edge, by_node = site.edges["input"], graph.sites.by_node
    found, value, factor = quantizers.get(edge.key), edge.value, 1.0
    while found is None and value not in by_node:
        if op_name(value) in SCALINGS:
            number = float(value.args[1])  # type: ignore[arg-type]
            factor = factor / number if "div" in op_name(value) else factor * number
        elif op_name(value) not in VIEWS:
            return None, factor
        value = value.args[0]  # type: ignore[assignment]
    return found or quantizers.get(f"{by_node[value].name}.output"), factor
