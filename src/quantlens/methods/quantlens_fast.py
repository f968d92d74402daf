"""quantlens-fast: our own method of calibration and closed form alone; what works, put together.

1. Exact rewrites. Massive channels behind an activation function get a linear layer of their own
   (``transforms.outlier_channels``). What a coarse activation (6 bits or fewer) holds that a layer reads behind
   a LayerNorm or a GELU is multiplied at run time by a Hadamard matrix of 64 channels with random signs, as QuaRot does
   before the down projection of language models; the layer's weight undoes it. It costs 64 multiplications a channel
   and layer, 17 % of those of DeiT-Tiny's linear layers, 4 % of DeiT-Base's, in float. With more bits the residual
   stream is rotated instead, at no cost, by a random orthogonal matrix that keeps the vector of ones and so commutes
   with LayerNorm (``transforms.rotation``), where the graph proves that exact (not Swin's). q with k, and v
   with the layer behind it, are rotated in every head (:mod:`quantlens.transforms.heads`). All that a linear layer
   and an attention product read then has channels of one size, near to Gaussian: one scale per tensor is as good as
   one per channel. The means of channels are taken out of all that a bias can give them back to
   (:mod:`quantlens.transforms.mean_subtraction`).
2. Ranges. Activations are clipped at ±t with the least squared error (``clipping``), on what the
   quantized layers before make of them. Softmax outputs have no range: every row is squares of integers by its own peak
   and sum (``formats.sqrt_softmax``). Nor have activations of 3 bits or fewer: every token's channels, 64 at a
   time (a head; what was rotated together), are quantized by their own root mean square
   (:mod:`quantlens.formats.group_scaled`), where that has the smaller squared error.
3. Weights. W' with the least ‖W'·X̄ − W·X‖² + λ‖W' − W‖²: X is what the quantized network brings to the layer, X̄ what
   the layer's own quantizer makes of it (ERQ's activation step, Zhong et al., ICML 2024, but on the quantized network's
   inputs). W' is rounded column by column, largest input first, each error taken up by the columns behind it (GPTQ,
   Frantar et al., ICLR 2023), and the bias takes up the mean. λ is 0.1 of the mean squared input in both. Behind blocks
   W itself is rounded: the fit gains nothing there on images like those to come.

Every weight is uniform per output channel. With 4 bits or more, every activation is uniform per tensor, softmax outputs
apart, whose squares fit 8-bit integers up to 4 bits; ``softmax=uniform`` leaves nothing but uniform formats. With fewer
bits, ``activations=tensor`` has one scale per tensor; with more, ``activations=block`` has blocks there too.

What the latest parts are worth, 64 images of calibration, KL divergence from the float model on 200 others: DeiT-Tiny
W4A4 0.377 without them, 0.263 with rotated hidden values, 0.248 with rows too, 0.273 with means taken out too; W3A3
3.69, 3.58, 1.63, 1.58; ViT-Tiny W4A4 0.90, 0.74, 0.71, 0.61. The error of GELU's outputs alone, behind the layer that
reads them, falls by 3.9 dB (DeiT-Tiny, mean of the blocks; by 9 dB in the last one), in blocks of 16 channels by 2.4,
of 256 by 4.6; a scale per channel instead raises it.

Blocks, 32 images of calibration, 400 others, top-1 % and KL: DeiT-Tiny W3A3 40.8 / 1.51 with a scale per tensor, 46.3 /
1.41 with levels on both sides of zero, 48.0 / 1.22 with a scale per token, 51.8 / 1.04 with 64 channels, 50.3 / 1.02
with 32, 54.3 / 0.93 with 16; ViT-Tiny 9.0 / 4.46, 9.3 / 4.20, 16.0 / 3.66, 22.0 / 3.20. The layer of ViT-Tiny that has
a massive channel split off (767 channels are left) is rotated too, with a channel of zeros: 4.46 to 4.25, W4A4 0.635 to
0.591. With the fit and without it behind blocks: DeiT-Tiny W4A4 0.159 and 0.160, W3A3 1.03 and 0.96, ViT-Tiny 0.39 and
0.37, 2.94 and 3.13; calibrated on flowers alone, DeiT-Tiny W4A4, two draws, 200 and 400 images: 72.0 / 0.266 and 80.0 /
0.182 (FP32 81.5), 72.5 and 70.0 (76.75); one scale per tensor 57.5 / 0.713 and 57.0. Weights with levels on both sides
of zero, per channel: 1.07 for 1.03 and 2.99 for 2.94, left out.

Behind LayerNorms the rotation at run time replaces that of the residual stream (``norms``), because the LayerNorm's
scale belongs in front of it. ViT-Tiny's stream has large channels that the scale turns down; rotated with the stream
they are in all channels, and the scale, folded into the weights, comes too late. At W8A3, KL on 200 images, 1.36 with
all activations quantized, 0.55 without the inputs of every block's fc1, 0.75 without the first block's activations.
32 images of calibration, 400 others, one seed, top-1 % and KL:
ViT-Tiny W3A3 20.8 / 3.13 to 35.0 / 2.29, W4A4 65.8 / 0.59 to 69.3 / 0.55, in blocks 72.3 / 0.37 to 73.0 / 0.34;
DeiT-Tiny W3A3 53.5 / 0.93 to 56.3 / 0.86, W4A4 71.5 / 0.257 to 72.8 / 0.240. Matrices there that balance what is
quantized with what reads it (the geometric mean of the inverse covariance and the Gram matrix), W3A3, KL, in a
prototype with signs of every layer's own (DeiT-Tiny's 0.86 above is its, too): of all channels 2.55 and 0.93, of 64
2.76 and 0.87, diagonal ones in front of the Hadamard matrix 2.58 and 0.85, none 2.38 and 0.86: left out.
Blocks of 64, 32 and 16 channels: ViT-Tiny 2.29, 2.23, 2.13.

Tried and left out, DeiT-Tiny W4A4, before these, KL on 200 images: fitting to the float network's inputs instead of
the quantized one's (1.48 against 0.38: the fitted weights shrink with the noise of all layers before them); no
rotation in the heads (0.38 against 0.27). Without the fit, on 150 images: ranges by ``mse``
2.36, by RepQ-ViT's quantiles 0.49. Beside rows and rotated hidden values, heads made equally large before proj by the
square root of their size: 0.251 for 0.248 (ViT-Tiny 0.64 for 0.71, DeiT-Tiny W3A3 1.57 for 1.63), wholly: 0.272.
Matrices in front of the quantizers that balance all channels of a head, or behind a GELU each channel, for the least
product of errors (geometric mean of the inverse covariance and the Gram matrix of what reads them): promised 1 to 3 dB,
DeiT-Tiny W4A4 0.255 (values), 0.269 (hidden) and 0.33 (scores) for 0.251, 32 images, KL on 100 others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantlens.calibration import Calibration, CalibrationPass, EdgeView, Observation, Transform
from quantlens.calibration.products import patches
from quantlens.calibration.ranges import affine, block_scaled, clipping, log_by_quantile, mse
from quantlens.calibration.ranges.rules import REPQ_QUANTILES
from quantlens.calibration.transforming import subtract_means
from quantlens.errors import QuantlensError
from quantlens.formats import BlockScaled, Quantizer, SquaredRows, Uniform
from quantlens.graph import Edge, Graph
from quantlens.graph.graph import op_name
from quantlens.graph.sites import Site, dynamic_nodes
from quantlens.methods.base import (
    MATMUL_OPERANDS,
    SHARED_OPTIONS,
    Method,
    MethodInfo,
    Option,
    Run,
    Widths,
    matmul_operand_edges,
)
from quantlens.qmodel import Plan
from quantlens.qmodel.bits import FLOAT
from quantlens.reconstruction.bias import corrected_layers
from quantlens.reconstruction.closed_form import Grid, Moments, output_shift, ridge, round_columns
from quantlens.transforms.heads import find_score_pairs, find_value_pairs, rotate_scores, rotate_values
from quantlens.transforms.rewrites import ACTIVATIONS, ensure_bias, find_norm_groups
from quantlens.transforms.rotation import alone, find_residuals, hadamard, mean_keeping, rotate_input, rotate_residual

TAIL = 1.0 - min(REPQ_QUANTILES)

BLOCK, SMALLEST = 64, 8
"""Channels that are rotated together at run time, at most and at least."""

NARROW = 3
"""Bits at which an activation's scale is found at run time, token by token."""

SAMPLE = 8
"""Images that the step of blocks is found on."""

COARSE = 6
"""Bits at which a rotation at run time is worth its product."""


class QuantlensFast(Method):
    info = MethodInfo(
        name="quantlens-fast",
        title="quantlens-fast",
        paper="quantlens: rotations that commute with LayerNorm, clipped ranges, weights fitted in closed form",
        venue="quantlens",
        year=2026,
        url="docs/methods.md",
        quantizes=MATMUL_OPERANDS,
        version=5,
        summary="exact rotations, clipped ranges, weights fitted and rounded in closed form on quantized inputs",
        departures="our own; each part can be switched off",
        aliases=("fast",),
        options={
            "rotate": Option(
                "all",
                "rotations: all, residual (the residual stream), heads (inside heads), or none",
                ("all", "residual", "heads", "none"),
            ),
            "centre": Option(
                "auto",
                "means of channels taken out of LayerNorm outputs, keys, attention outputs and rotated hidden values: "
                f"auto (where an activation has {COARSE} bits or fewer), all or none",
                ("auto", "all", "none"),
            ),
            "norms": Option(
                "auto",
                "where inputs of layers behind a LayerNorm are rotated: residual (with the residual stream, at no "
                f"cost), blocks (at run time, {BLOCK} channels together, behind the norm's scale), or auto (blocks "
                f"where one of them has {COARSE} bits or fewer)",
                ("auto", "residual", "blocks"),
            ),
            "hidden": Option(
                "auto",
                f"inputs of layers behind an activation function, rotated at run time, {BLOCK} channels together: "
                f"auto (where they have {COARSE} bits or fewer), all or none",
                ("auto", "all", "none"),
            ),
            "fit": Option(
                "auto",
                "weights fitted to the float output on quantized inputs: True, False, or auto (where a layer's "
                "input has one scale)",
                ("auto", True, False),
            ),
            "rounding": Option(
                "columns",
                "rounding of weights: columns (errors taken up by later columns) or nearest",
                ("columns", "nearest"),
            ),
            "damping": Option(0.1, "λ of both, in units of the mean squared input"),
            "softmax": Option(
                "rows",
                "softmax outputs: rows (squares of the codes, every row by its own peak and sum), uniform, "
                "log-sqrt2, or auto (of the last two the one with the smaller squared error)",
                ("rows", "uniform", "log-sqrt2", "auto"),
            ),
            "activations": Option(
                "auto",
                "what shares a scale of an activation: tensor, block (every token's channels, some at a time, by their "
                f"own root mean square at run time), or auto (block where it has {NARROW} bits or fewer)",
                ("auto", "tensor", "block"),
            ),
            "block": Option(BLOCK, "channels of a block, at most"),
            "massive_channels": replace(SHARED_OPTIONS["massive_channels"], default="split"),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        check("quantlens-fast", run)
        plan = Plan({}, rewrite(graph, calibration, bits, run))
        calibrate(graph, calibration, bits, plan, run)
        return plan


def check(method: str, run: Run) -> None:
    """Raises QuantlensError for options out of range."""
    if not float(run["damping"]) > 0:
        raise QuantlensError(f"{method}: damping={run['damping']}; give a number above 0, such as 0.1")
    block = run["block"]
    if not isinstance(block, int) or block < SMALLEST or block & (block - 1):
        raise QuantlensError(f"{method}: block={block}; give a power of two from {SMALLEST} on, such as {BLOCK}")


def rewrite(graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> list[str]:
    """Rotate and centre what the graph proves to be exact, and the inputs of layers behind a LayerNorm or an activation
    function, as the options ``rotate``, ``norms``, ``centre`` and ``hidden`` say; returns one sentence per kind."""
    generator = torch.Generator().manual_seed(run.seed)
    which, done = run["rotate"], []
    lifted = _lifted(graph, bits, run)
    if which in ("all", "residual"):
        residuals = [r for r in find_residuals(graph) if not lifted & {x.name for n in r.norms for x in n.linears}]
        for residual in residuals:
            rotate_residual(graph, residual, mean_keeping(residual.channels, generator))
        if residuals:
            done.append(f"residual stream rotated ({len(residuals)})")
    if which in ("all", "heads"):
        values, scores = find_value_pairs(graph), find_score_pairs(graph)
        for pair in values:
            rotate_values(graph, pair, generator)
        for both in scores:
            rotate_scores(graph, both, generator)
        if values or scores:
            done.append(f"v rotated in the heads of {len(values)} attentions, q and k of {len(scores)}")
        graph.invalidate()
    turned = [site for site in behind_activations(graph) if _coarse(graph, site, bits, run["hidden"])]
    means: dict[str, Tensor] = {}
    if run["centre"] == "all" or (run["centre"] == "auto" and _any_coarse(graph, bits)):
        said, means = subtract_means(graph, calibration, (f"{site.name}.input" for site in turned))
        done += said
    rotations: dict[int, Tensor] = {}
    for site in [*turned, *(graph.sites[name] for name in sorted(lifted))]:
        size = together(graph, site)
        if size not in rotations:
            rotations[size] = hadamard(size, generator)
        rotate_input(graph, site, rotations[size], means.get(f"{site.name}.input"))
    for sites, what in ((turned, "an activation function"), (lifted, "a LayerNorm")):
        if sites:
            done.append(f"inputs of {len(sites)} layers behind {what} rotated at run time")
    graph.invalidate()
    return done


def _lifted(graph: Graph, bits: Widths, run: Run) -> set[str]:
    """Names of the layers behind a LayerNorm whose inputs are rotated at run time: all or none, because the finer ones
    lose the residual stream's rotation by it."""
    if run["rotate"] not in ("all", "residual") or run["norms"] == "residual":
        return set()
    sites = [site for group in find_norm_groups(graph) for site in group.linears if alone(graph, site)]
    if run["norms"] == "auto" and not any(_coarse(graph, site, bits, "auto") for site in sites):
        return set()
    return {site.name for site in sites if _coarse(graph, site, bits, "all")}


def together(graph: Graph, site: Site) -> int:
    """How many input channels of a layer are rotated together: the largest power of two that divides their number, at
    most :data:`BLOCK`. :data:`BLOCK`, zeros behind them, where that is next to none (a layer of 767 channels, a massive
    one split off)."""
    channels = graph.tensor(str(site.weight)).shape[1]
    size = min(BLOCK, channels & -channels)
    return BLOCK if size < SMALLEST and channels > BLOCK else size


def behind_activations(graph: Graph) -> list[Site]:
    """Linear layers with weights of their own that read an activation function, or a product of two activations (gated
    MLPs), or some channels of these."""
    dynamic = dynamic_nodes(graph)

    def behind(node: Any) -> bool:
        if op_name(node) == "aten.index_select.default":
            node = node.args[0]
        gated = op_name(node) == "aten.mul.Tensor" and all(n in dynamic for n in node.args)
        return gated or op_name(node) in ACTIVATIONS

    return [site for site in graph.sites.of_kind("linear") if behind(site.node.args[0]) and alone(graph, site)]


def _any_coarse(graph: Graph, bits: Widths) -> bool:
    """Whether some activation has :data:`COARSE` bits or fewer."""
    return any(bits.of(graph, e) <= COARSE for e in matmul_operand_edges(graph) if not e.is_weight)


def _coarse(graph: Graph, site: Site, bits: Widths, wanted: str) -> bool:
    """Whether the input of a layer is rotated at run time under an option ``wanted``: all, none, or auto."""
    if wanted == "none" or together(graph, site) < SMALLEST:
        return False
    width = bits.of(graph, site.edges["input"])
    return width != FLOAT and (wanted == "all" or width <= COARSE)


def calibrate(
    graph: Graph, calibration: Calibration, bits: Widths, plan: Plan, run: Run, *, rounded: bool = True
) -> dict[str, Tensor]:
    """One walk: the range of every activation and the weight of every layer, each on what the quantized part before it
    makes of the images. Puts quantizers into ``plan``, with what shares a scale in how many activations, and fitted
    weights and biases into ``graph``; with ``rounded=False`` the weights as they are before rounding. Returns these by
    name."""
    # a layer that shares its bias or weight with another keeps both
    free = {site.name for site in corrected_layers(graph)}
    names = [site.weight for site in graph.sites.of_kind("linear", "conv")]
    fitted: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}

    def decide(edge: Edge, look: EdgeView) -> Transform:
        width, site = bits.of(graph, edge), graph.sites[edge.site]
        if not edge.is_weight:
            plan.quantizers[edge.key] = made = activation(site, edge, look, width, run)
            return made
        weight = graph.tensor(str(site.weight))
        flat = weight.flatten(1)
        own = plan.quantizers.get(f"{site.name}.input")
        moments = _moments(site, weight, look, own) if names.count(site.weight) == 1 else None
        fit = not isinstance(own, BlockScaled) if run["fit"] == "auto" else run["fit"]
        target = ridge(flat, moments, float(run["damping"])) if fit and moments is not None else flat
        quantizer = bits.weights(*mse(Observation.of(target), width), width)
        plan.quantizers[edge.key] = quantizer
        if moments is None:
            return quantizer
        value = _rounded(target, moments, quantizer, run, own_bias=site.name in free)
        if site.name in free:
            bias = ensure_bias(graph, site)
            shift = output_shift(flat, value, moments)
            graph.set_tensor(bias, (graph.tensor(bias).double() - shift).to(weight.dtype))
        value = value.reshape(weight.shape)
        targets[str(site.weight)] = target.reshape(weight.shape)
        fitted[str(site.weight)] = value if rounded else targets[str(site.weight)]
        return lambda _: value

    edges = [e for e in matmul_operand_edges(graph) if bits.of(graph, e) != FLOAT]
    CalibrationPass(graph, calibration, sequential=True, seed=run.seed).run(edges, decide, run.progress)
    for name, value in fitted.items():
        graph.set_tensor(name, value)
    graph.invalidate()
    kinds = [plan.quantizers[e.key].granularity for e in edges if not e.is_weight]
    plan.notes["activations"] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return targets


def activation(site: Site, edge: Edge, look: EdgeView, width: int, run: Run) -> Quantizer:
    """The quantizer of one activation."""
    softmax = run["softmax"]
    if not edge.key.endswith(".probs.output"):
        uniform = affine(*clipping(look(), width), width)
        wanted = run["activations"] == "block" or (run["activations"] == "auto" and width <= NARROW)
        return _in_blocks(edge, look, uniform, int(run["block"])) if wanted and site.kind != "conv" else uniform
    if softmax == "uniform":
        return affine(*clipping(look(), width), width)
    if softmax == "rows":
        return SquaredRows(width)
    seen = look(tail=TAIL)
    log = log_by_quantile(seen, width)
    if softmax == "log-sqrt2":
        return log
    uniform = affine(*clipping(seen, width), width)
    return min((uniform, log), key=lambda q: float((q(seen.values) - seen.values).square().sum()))


def _in_blocks(edge: Edge, look: EdgeView, uniform: Uniform, block: int) -> Quantizer:
    """Blocks of channels with scales of their own, where their squared error is smaller than that of ``uniform``, which
    has one for the tensor."""
    # a product sums over the first dimension of its second operand: keys are [..., channels, tokens]
    axis = -2 if edge.name == "k" else -1
    values = look.tensors()[0][:SAMPLE]
    channels = values.shape[axis]
    size = min(block, channels & -channels)
    if size < SMALLEST:
        return uniform
    blocks = block_scaled(values, uniform.bits, size, axis=axis)
    return min((uniform, blocks), key=lambda q: float((q(values) - values).square_().sum()))


def _moments(site: Site, weight: Tensor, look: EdgeView, own: Quantizer | None) -> Moments | None:
    """Moments of a layer's inputs behind its own quantizer, and in front of it; None for a convolution that is no
    product."""
    pieces = look.tensors(site.edges["input"])
    if patches(site, weight, pieces[0][:1]) is None:
        return None

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for piece in pieces:
            plain = patches(site, weight, piece)
            quantized = plain if own is None else patches(site, weight, own(piece))
            assert plain is not None
            assert quantized is not None
            yield quantized, plain

    try:
        return Moments.of(pairs())
    except ValueError as error:
        raise QuantlensError(f"{site.name}.input: {error}; check the weights and the calibration images") from error


def _rounded(target: Tensor, moments: Moments, quantizer: Quantizer, run: Run, *, own_bias: bool) -> Tensor:
    grid = Grid.of(quantizer)
    if run["rounding"] == "nearest":
        return grid.round(target)
    gram = moments.gram if own_bias else moments.second
    order = gram.diagonal().argsort(descending=True)
    return round_columns(target, gram, grid, damping=float(run["damping"]), order=order)
