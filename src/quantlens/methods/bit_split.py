"""bit-split: bit-split and stitching of weights, error-compensated activations (Wang et al., ICML 2020).

Weights: W ≈ α·Q, one α per output channel, Q integers of b bits without −2ᵇ⁻¹. Q is split into b − 1 ternary vectors,
Q = Σ 2ʲ·Bⱼ with Bⱼ ∈ {−1, 0, 1}, which are optimised in turn, the others fixed, and stitched together again, for

    min ‖Y − X̂·(α·Q)ᵀ‖²  =  min over each channel of  α²·q·H·q − 2α·t·q,    H = X̂ᵀX̂,  t = yᵀX̂

with α in closed form (t·q)/(q·H·q), and each Bⱼ coordinate by coordinate, exactly: the best of −1, 0 and 1. X̂ is the
layer's quantized input and Y the float output, so that the weights take up the activations' error. They start from
rounding, alternated with the α of least squared error. Activations: one symmetric scale per tensor, codes ±(2ᵇ⁻¹ − 1),
tensors without negative values unsigned 0 … 2ᵇ − 1; the scale of least squared error, found by the same alternation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlens.calibration import Calibration, CalibrationPass, EdgeView, ProductSampler, check_finite, patches
from quantlens.formats import Quantizer, Uniform
from quantlens.graph import Edge, Graph, Site
from quantlens.methods.base import (
    MATMUL_OPERANDS,
    Departure,
    Method,
    MethodInfo,
    Option,
    Plan,
    Run,
    Widths,
    quantized_edges,
)
from quantlens.methods.composition import Fitted, Layer, fit_layers

ROWS = 8192
"""Tokens (positions) that a layer's weights are fitted on."""

ENOUGH = 8
"""Rows per input channel below which a layer is fitted to its weights instead of its outputs."""

VALUES = 1 << 17
"""Values that a scale of least squared error is fitted on."""

SMALLEST = torch.finfo(torch.float32).tiny * 1e6
"""Values up to here are nothing to represent: any scale does."""

STARTS = 40
BLOCK = 32
CONVERGED = 1e-2


class BitSplit(Method):
    info = MethodInfo(
        name="bit-split",
        title="Bit-Split",
        paper="Towards Accurate Post-training Network Quantization via Bit-Split and Stitching",
        venue="ICML",
        year=2020,
        url="https://proceedings.mlr.press/v119/wang20c.html",
        quantizes=MATMUL_OPERANDS,
        summary="weights bit by bit against the layer's output, on quantized inputs; activations by squared error",
        departures=(
            Departure("rounds", 10, 100, "most rounds over all bits of a layer"),
            Departure(
                "inputs",
                "quantized",
                "network",
                "weights are fitted on the float network's inputs through the layer's own quantizer; the paper's on "
                "what the quantized network makes of them, where weights of a transformer shrink from layer to layer",
            ),
            Departure(
                "damping",
                1.0,
                0.0,
                "the distance to the float weights is part of the objective; a few images of a transformer leave "
                "directions in which nearly nothing was seen",
            ),
            Departure("head_bits", None, 8, "the last layer has the bits asked for, as the others; the paper's has 8"),
        ),
        readings=(
            "the alternation for activation scales starts from the best of 40 scales down to 1/40 of the largest, on a "
            "random sample of 2^17 values; the authors' starts from the largest magnitude and stops at the first fixed "
            "point, which in a transformer is close to min-max",
            "a layer stops when a round gains less than 1 % of what all rounds gained",
            "a layer with fewer than 8 rows per input channel (the classifier) is fitted to its weights instead, as "
            "every fully connected layer in their code; so is a convolution with groups, or with padding given as a "
            "word",
            "operands of the attention's products, which have no weights, get scales of least squared error alone",
            "a transformer has no batch norm, whose statistics they estimate anew",
            "up to 8192 tokens (positions) are used per layer; layers that share one weight share the quantizer",
        ),
        aliases=("bitsplit",),
        options={
            "rounds": Option(10, "most rounds over all bits of a layer (the authors: 100)", least=1),
            "damping": Option(
                1.0, "weight of the distance to the float weights, as a multiple of the inputs' mean square"
            ),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        network = run["inputs"] == "network"
        exact = float_rows(graph, calibration, bits, run.seed) if network else {}
        generator = torch.Generator().manual_seed(run.seed)

        def quantizer(site: Site, edge: Edge, view: EdgeView, width: int) -> Quantizer:
            return activation_quantizer(view.tensors(), width, generator, edge.key)

        def fit(layer: Layer) -> Fitted:
            check_finite(f"{layer.site.name}.weight", layer.weight)
            rows = layer_rows(layer.site, layer.pieces, layer.stored, run.seed)
            codes, scale = round_alternating(layer.weight, layer.width)
            target = exact.pop(layer.site.name, rows)
            cross, gram = layer.weight, None
            if rows is not None and target is not None:
                inputs = rows if layer.own is None else layer.own(rows)
                gram, cross = inputs.T @ inputs, (target @ layer.weight.T).T @ inputs
                damping = run["damping"] * gram.diagonal().mean()
                gram.diagonal().add_(damping)
                cross.add_(layer.weight * damping)
            codes, scale, _ = bit_split(cross, gram, codes, scale, layer.width, run["rounds"])
            made = Uniform(scale, None, layer.width, signed=True, granularity="channel", axis=0)
            return Fitted(made, codes * made.scale[:, None])

        plan = Plan()
        count = fit_layers(graph, calibration, bits, plan, fit, run, sequential=network, ranges=quantizer)
        if count:
            plan.rewrites.append(f"weights of {count} layers replaced by their stitched values")
        return plan


# -- a layer's data ------------------------------------------------------------------------------------------------
def float_rows(graph: Graph, calibration: Calibration, bits: Widths, seed: int) -> dict[str, Tensor | None]:
    """:func:`layer_rows` of the float network, by name of the layer, for all whose weights are quantized."""

    def rows(edge: Edge, view: EdgeView) -> Tensor | None:
        site = graph.sites[edge.site]
        return layer_rows(site, view.tensors(), graph.tensor(str(site.weight)), seed)

    inputs = [graph.sites[e.site].edges["input"] for e in quantized_edges(graph, bits) if e.is_weight]
    found = CalibrationPass(graph, calibration, sequential=False, seed=seed).run(inputs, rows)
    return {edge.site: value for edge, value in found.items()}


def layer_rows(site: Site, pieces: Sequence[Tensor], weight: Tensor, seed: int) -> Tensor | None:
    """Up to :data:`ROWS` input rows [m, in] of a layer; the same tokens whenever it is asked. ``None`` for a
    convolution that is no product, and where there are not :data:`ENOUGH`."""
    if patches(site, weight, pieces[0][:1]) is None:
        return None
    sampler, share = ProductSampler(torch.Generator().manual_seed(seed)), -(-ROWS // len(pieces))
    rows = torch.cat([sampler.some_rows([patches(site, weight, piece)], share) for piece in pieces])
    check_finite(f"{site.name}.input", rows)
    return rows if len(rows) >= ENOUGH * rows.shape[1] else None


# -- scales of least squared error ------------------------------------------------------------------------------------
def activation_quantizer(pieces: Sequence[Tensor], bits: int, generator: torch.Generator, name: str = "") -> Uniform:
    """One symmetric scale with the least squared error over pieces of any shape; unsigned codes where no value is
    negative."""
    for piece in pieces:
        check_finite(name, piece)
    unsigned = all(bool((piece >= 0).all()) for piece in pieces)
    high = torch.stack([piece.abs().max() for piece in pieces]).max()
    if not bool(high > SMALLEST):
        return Uniform(torch.ones(()), None, bits, signed=not unsigned)
    top = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
    bottom = 0 if unsigned else -top
    sampler, share = ProductSampler(generator), -(-VALUES // len(pieces))
    values = torch.cat([sampler.some_values(piece, share) for piece in pieces])[None]
    scales = high / top * torch.arange(1, STARTS + 1, device=high.device) / STARTS
    rounded = ((values / s).round_().clamp_(bottom, top).mul_(s) for s in scales)
    errors = torch.stack([found.sub_(values).square_().sum() for found in rounded])
    scale = _alternate(values, scales[errors.argmin()][None], bottom, top)[0]
    return Uniform(scale, None, bits, signed=not unsigned)


def round_alternating(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes [out, in] within ±(2ᵇ⁻¹ − 1) and scale [out] of a weight: rounding and the scale of least squared error in
    turn, from the largest magnitude, until the scale stays (Wang et al., the start of Algorithm 1)."""
    top, largest = 2 ** (bits - 1) - 1, weight.abs().amax(1)
    scale = _alternate(weight, torch.where(largest > SMALLEST, largest / top, 1.0), -top, top)
    return (weight / scale[:, None]).round_().clamp_(-top, top), scale


def _alternate(rows: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """[g] scales that rounding and least squares, in turn, lead to from ``scale``, for rows [g, m]."""
    for _ in range(50):
        codes = (rows / scale[:, None]).round_().clamp_(low, high)
        norm = codes.square().sum(1)
        new = torch.where(norm > 0, (rows * codes).sum(1) / norm.clamp_min(1), scale)
        if bool(((new - scale).abs() <= 1e-4 * scale).all()):
            return new
        scale = new
    return scale


# -- bit by bit ---------------------------------------------------------------------------------------------------
def bit_split(
    cross: Tensor, gram: Tensor | None, codes: Tensor, scale: Tensor, bits: int, rounds: int
) -> tuple[Tensor, Tensor, list[float]]:
    """Optimise integer codes bit by bit: least Σ over channels of α²·q·H·q − 2α·t·q (section 3 of the paper).

    cross: [out, in] rows t = yᵀX̂. gram: H = X̂ᵀX̂ [in, in], or ``None`` for the identity (cross is then W, the objective
    the weight's own error). codes: [out, in] integers within ±(2ᵇ⁻¹ − 1) to start from. scale: α > 0, [out].

    Returns codes, scale and the objective (summed over channels) before the first and after each round, which never
    rises.
    """
    if gram is None:
        gram = torch.eye(cross.shape[1], dtype=cross.dtype, device=cross.device)
    planes = split_bits(codes, bits)
    history = [_cost(cross, gram, codes, scale)]
    for _ in range(rounds):
        scale = _best_scale(cross, gram, codes, scale)
        for bit in range(len(planes) - 1, -1, -1):
            _optimise_bit(cross, gram, planes, bit, scale)
        codes = stitch_bits(planes)
        scale = _best_scale(cross, gram, codes, scale)
        history.append(_cost(cross, gram, codes, scale))
        if history[-2] - history[-1] <= CONVERGED * abs(history[0] - history[-1]):
            break
    return codes, scale, history


def split_bits(codes: Tensor, bits: int) -> Tensor:
    """[bits − 1, in, out] ternary planes Bⱼ of codes [out, in], with Σ 2ʲ·Bⱼ = codesᵀ; the sign goes to every
    bit."""
    powers = 2 ** torch.arange(bits - 1, device=codes.device)
    magnitude = codes.abs().T.long()
    return (magnitude // powers[:, None, None] % 2).to(codes.dtype) * codes.T.sign()


def stitch_bits(planes: Tensor) -> Tensor:
    """[out, in] codes Σ 2ʲ·Bⱼ of planes [bits, in, out]."""
    powers = (2 ** torch.arange(len(planes), device=planes.device)).to(planes.dtype)
    return torch.einsum("b,bio->oi", powers, planes).contiguous()


def _optimise_bit(cross: Tensor, gram: Tensor, planes: Tensor, bit: int, scale: Tensor) -> None:
    """One pass over the coordinates of a ternary plane [in, out], in place: each the best of −1, 0, 1 for every
    channel, all else fixed.

    pull = (t − α·H·q)/α is the descent direction of q; along coordinate n, with weight s = 2ʲ, the objective is a
    parabola whose minimum lies at B + pull/(s·Hₙₙ). A block's own pull is kept up to date coordinate by coordinate,
    the others' after the block.
    """
    step, plane, curvature = float(2**bit), planes[bit], gram.diagonal()
    pull = (cross / scale[:, None]).T - gram @ stitch_bits(planes).T
    alive = curvature > curvature.max().clamp_min(0) * torch.finfo(curvature.dtype).eps
    inverse = torch.where(alive, 1 / (step * curvature.clamp_min(torch.finfo(curvature.dtype).tiny)), 0.0).tolist()
    for start in range(0, len(plane), BLOCK):
        stop = min(start + BLOCK, len(plane))
        mine, old = plane[start:stop], plane[start:stop].clone()
        local, block = pull[start:stop], gram[start:stop, start:stop] * step
        rows, values = local.unbind(), mine.unbind()
        for i, (pulled, value, reach) in enumerate(zip(rows, values, block.unbind(), strict=True)):
            if inverse[start + i] == 0.0:
                continue
            new = torch.add(value, pulled, alpha=inverse[start + i]).round_().clamp_(-1, 1)
            change = new - value
            value.copy_(new)
            local.addr_(reach, change, alpha=-1)
        if stop < len(plane):
            pull[stop:].addmm_(gram[stop:, start:stop], mine - old, alpha=-step)


def _best_scale(cross: Tensor, gram: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """α = (t·q)/(q·H·q) per channel; the old one where that is not positive."""
    along, norm = (cross * codes).sum(1).double(), ((codes @ gram) * codes).sum(1).double()
    best = along / norm.clamp_min(torch.finfo(torch.float64).tiny)
    usable = (norm > 0) & torch.isfinite(best) & (best > SMALLEST)
    return torch.where(usable, best.to(scale.dtype), scale)


def _cost(cross: Tensor, gram: Tensor, codes: Tensor, scale: Tensor) -> float:
    values = codes * scale[:, None]
    return float((((values @ gram) * values).double() - 2 * (values * cross).double()).sum())
