"""aocq: adaptive outlier correction quantization (Li et al., FITEE 26(10):1879–1895, 2025).

A fully quantized vision transformer (LayerNorm inputs, residual sums, softmax and GELU inputs too), whose channels and
tokens differ too much in size for one scale, is corrected at three levels:

* operator level: Add_α and LN_α balance the channels by an equivalent transformation;
* framework level: block by block, stage one refines the activations' scales in successive steps, s₀ → s₄, then stage
  two optimises the direction in which weights are rounded, with the imbalance moved into the weights;
* loss level: the block-wise reconstruction loss has a token norm that suppresses extreme tokens.

Of the paper, the abstract, plots and tables alone are public: the formulas are derived here (docs/aocq.md).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantlens.calibration import (
    REPQ_QUANTILES,
    Calibration,
    CalibrationPass,
    EdgeView,
    Observation,
    Observer,
    affine,
    clipping,
    closest,
    log_by_quantile,
    mse,
    token_weights,
)
from quantlens.formats import MAX_ZERO_POINT, PowerOfTwo, Quantizer, Uniform, bounded_
from quantlens.graph.graph import VIEWS, op_name
from quantlens.methods._reconstruction import CHECKPOINT, FULL, steps, train, weight_quantizers
from quantlens.methods.base import (
    EVERYTHING,
    FLOAT,
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
from quantlens.reconstruction import Settings
from quantlens.transforms import (
    Factors,
    NormGroup,
    balance,
    columns,
    equalise_norms,
    find_norm_groups,
    keeps_channels_last,
    smooth_factors,
)

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""m of LN_α's candidates: how far the channels' ranges are evened out."""
ROWS = 1024
"""Tokens on which LN_α's candidates are compared."""
EXPONENTS = 7
"""Largest shift of Add_α."""
ROUNDS = 4
"""s₀ → s₄."""

STAGES = {
    "scales": ("scale_iterations", Settings(("scales",), inputs="quantized", rounds=ROUNDS, lr_scales=0.003)),
    "rounding": ("iterations", Settings(("rounding",), inputs="mixed", straight_through=True, lr_rounding=0.03)),
}
"""Level two: stage -> (option with the steps per block, how blocks are trained)."""

READINGS = (
    "only the idea is public: the formulas of all three levels are derived (docs/aocq.md)",
    "LN_α: LN(x) becomes LN(x)/α − t, the linear layers after it take up both exactly. t centres every channel; α is "
    "a power of the half-range, or SmoothQuant's factor: of these candidates the one with the least squared error of "
    "the layers' outputs, both sides quantized",
    "Add_α: what a residual sum or a LayerNorm reads, and the sum itself, has one scale, a shift (0 … 7) and an "
    "integer zero point per channel; so have GELU inputs and the patch embedding's output. For every candidate scale "
    "each channel takes the shift with its least error, at sums and LayerNorm inputs by token, relative to its "
    "variance",
    "s₀ has the least squared error; each of four rounds of LSQ starts from the best scales so far with half the step "
    "of the round before, and counts only if the block's loss on all calibration images falls; weights are in float",
    "rounding: AdaRound straight through the rounded direction, on inputs half quantized and half float",
    "token norm: mean over tokens of ‖y − ŷ‖²/(‖y‖² + ε), ε = 1 % of the mean ‖y‖²",
    "a detector's boxes, and the places where it samples, are float: they are pixels, no features",
    "the arithmetic inside LayerNorm, softmax and GELU is float, between quantized inputs and outputs; softmax inputs "
    "that come out as 0 (Swin's mask) do not count for the range; softmax outputs are uniform or log√2, whichever has "
    "the smaller squared error; weights have one asymmetric scale per output channel",
)


class AOCQ(Method):
    info = MethodInfo(
        name="aocq",
        title="AOCQ",
        paper="An adaptive outlier correction quantization method for vision Transformers",
        venue="FITEE",
        year=2025,
        url="https://doi.org/10.1631/FITEE.2400994",
        quantizes=EVERYTHING,
        summary="channels balanced at LayerNorm and residual adds; learned activation scales, then learned rounding; "
        "block loss per token",
        readings=READINGS,
        aliases=("adaptive-outlier-correction",),
        version=3,
        arguments={"outlier_channels": "split"},
        options={
            "operator": Option(True, "level one: LN_α and Add_α balance the channels", (True, False)),
            "scales": Option(True, "level two, stage one: activation scales refined, s₀ → s₄", (True, False)),
            "rounding": Option(True, "level two, stage two: rounding of the weights learned", (True, False)),
            "loss": Option("token-norm", "level three: token-norm, or plain mse", ("token-norm", "mse")),
            "iterations": Option(80, f"steps per block in stage two, with {FULL} or more calibration images", least=0),
            "scale_iterations": Option(
                32, f"steps per block in stage one, over all {ROUNDS} rounds; likewise", least=0
            ),
            "batch_size": Option(8, "images per step", least=1),
            "checkpoint": CHECKPOINT,
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        plan = Plan()
        if run["operator"]:
            done = balance_norms(graph, calibration, bits, run.seed)
            plan.rewrites = [f"LN_α: channels balanced at {len(done)} LayerNorms"]
        plan.quantizers = activation_quantizers(graph, calibration, bits, run)
        weights, stages, told = weight_quantizers(graph, bits), [s for s in STAGES if run[s]], {}
        for number, stage in enumerate(stages):
            option, settings = STAGES[stage]
            if stage == "rounding":
                plan.quantizers |= weights
            count = steps(run, calibration.count, option)
            settings = replace(settings, iterations=count, loss=run["loss"], batch_size=run["batch_size"])
            told[stage] = train(graph, plan, calibration, run, settings, stage=stage, part=(number, len(stages)))
        plan.quantizers = weights | plan.quantizers
        plan.notes["reconstruction"] = told
        return plan


# -- level one: LN_α -----------------------------------------------------------------------------------------------
def balance_norms(graph: Graph, calibration: Calibration, bits: Widths, seed: int) -> list[str]:
    """LN_α at every LayerNorm that feeds linear layers alone, exactly. Returns the norms changed."""
    groups = {g.norm.edges["output"].key: g for g in find_norm_groups(graph)}
    generator = torch.Generator().manual_seed(seed)

    def on_edge(edge: Edge, view: EdgeView) -> Factors:
        pieces = [part.reshape(-1, part.shape[-1]) for part in view.tensors()]
        share = -(-ROWS // len(pieces))  # as many tokens from each
        picked = [torch.randperm(len(part), generator=generator)[:share].to(part.device) for part in pieces]
        rows = torch.cat([part[index] for part, index in zip(pieces, picked, strict=True)])
        return ln_alpha(graph, groups[edge.key], view(axis=-1), rows, bits)

    edges = [g.norm.edges["output"] for g in groups.values() if bits.of(graph, g.norm.edges["output"]) != FLOAT]
    found = CalibrationPass(graph, calibration, sequential=False, seed=seed).run(edges, on_edge)
    return equalise_norms(graph, list(groups.values()), {edge.site: factors for edge, factors in found.items()})


def ln_alpha(graph: Graph, group: NormGroup, seen: Observation, rows: Tensor, bits: Widths) -> Factors:
    """Of all candidates, the factors with the least squared error of the linear layers' outputs.

    seen: the LayerNorm's output by channel. rows: [n, C] a sample of it.
    """
    width = bits.of(graph, group.norm.edges["output"])
    weight_width = bits.of(graph, group.linears[0].edges["weight"])
    weight = torch.cat([graph.tensor(str(linear.weight)) for linear in group.linears])
    expected = rows @ weight.T
    half, middle = (seen.high - seen.low) / 2, (seen.high + seen.low) / 2

    def error(candidate: Factors) -> float:
        ends = [end / candidate.scale - candidate.shift for end in (seen.low, seen.high)]
        balanced = rows / candidate.scale - candidate.shift
        x = affine(ends[0].min(), ends[1].max(), width)(balanced) + candidate.shift
        w = weight * candidate.scale
        if weight_width != FLOAT:
            range_ = mse(Observation.of(w), weight_width, steps=10, shrink=0.05)
            w = affine(*range_, weight_width, granularity="channel", axis=0)(w)
        return float((x @ w.T - expected).square().sum())

    smooth = (smooth_factors(half, columns(graph, group), m) for m in STRENGTHS[1:-1])
    candidates = [balance(seen.low, seen.high, m) for m in STRENGTHS]
    return min([*candidates, *(Factors(scale, middle / scale) for scale in smooth)], key=error)


# -- level one: Add_α ----------------------------------------------------------------------------------------------
PASSES_ON = VIEWS | {"aten.cat.default"}
"""Operations that move values or join them to others."""


def shift_axis(graph: Graph, edges: Sequence[Edge]) -> int | None:
    """The dimension of the output channels (−1 of a linear layer, 1 of a convolution) of a tensor that one such layer
    makes and only GELUs, sums and LayerNorms read; None for any other tensor.

    The layer requantizes per output channel anyway, and what reads the values works on each alone: a power of two per
    channel is a shift at both ends. A matrix product would have to sum over channels of different scale.
    """
    site = graph.sites[edges[0].site]
    if len(edges) > 1 or edges[0].position is not None or site.kind not in ("linear", "conv"):
        return None
    kinds = {other.node: other.kind for other in graph.sites}
    read = [node for node, _ in readers(graph, site.node, PASSES_ON) if not op_name(node).startswith("aten.sym_size")]
    # an addition that is no site: of a constant, the position embedding
    found = {kinds.get(node, "add" if op_name(node) == "aten.add.Tensor" else "") for node in read}
    if not found or not found <= {"gelu", "add", "layer_norm"}:
        return None
    return -1 if site.kind == "linear" else 1


def residual_edges(graph: Graph) -> set[str]:
    """Keys of the edges whose value a residual sum reads or makes, or a LayerNorm reads, channels last: at the reader,
    and at the layer that made it (operations that only move tokens may lie between)."""
    by_node, sites = graph.sites.by_node, graph.sites.of_kind("layer_norm", "add")
    read = [edge for site in sites for edge in site.edges.values() if edge.position is not None]
    found = {edge.key for edge in read} | {site.edges["output"].key for site in sites if site.kind == "add"}
    for edge in read:
        node: Any = edge.value
        while node not in by_node and op_name(node) in VIEWS and keeps_channels_last(node, node.args[0]):
            node = node.args[0]
        if node in by_node and by_node[node].kind in ("linear", "add"):
            found.add(by_node[node].edges["output"].key)
    return found


def add_alpha(seen: Observation, bits: int, *, axis: int = -1, weights: Tensor | None = None) -> Quantizer:
    """The power-of-two format with the least squared error: seen by channel -> one scale, a shift per channel, and a
    zero point per channel that centres its range.

    weights: [m] of the sample's columns (:func:`token_weights`; None: all equal). Candidates of the scale: the largest
    channel's range over the codes and 2⁷, times 2^(i/4).
    """
    low, high, values = seen.low, seen.high, seen.values
    last = 2**bits - 1
    half, middle = (high - low).max() / 2, (low + high) / 2
    if not half > 0:
        return affine(low.min(), high.max(), bits)
    largest = torch.maximum(low.abs(), high.abs()).max()
    finest = max(float(half) / (last / 2) / 2**EXPONENTS, float(largest) / MAX_ZERO_POINT)
    mean = torch.full_like(values[0], 1 / values.shape[1]) if weights is None else weights / len(weights)

    def error(step: float) -> Tensor:
        zero = (last / 2 - middle / step).round()[:, None]
        return bounded_((values / step).round_(), -zero, last - zero).mul_(step).sub_(values).square_() @ mean

    scales = [finest * 2 ** (i / 4) for i in range(-3, 2)]
    tried = [torch.stack([error(scale * 2**k) for k in range(EXPONENTS + 1)]).min(0) for scale in scales]
    best = min(range(len(scales)), key=lambda i: float(tried[i].values.sum()))
    scale, exponents = scales[best], tried[best].indices
    zero = (last / 2 - middle / (scale * torch.exp2(exponents.float()))).round()
    return PowerOfTwo(torch.tensor(scale, device=low.device), exponents, zero, bits, axis=axis)


# -- starting point ------------------------------------------------------------------------------------------------
def activation_quantizers(graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> dict[str, Quantizer]:
    """s₀: a quantizer for every group of :func:`everything_edges`, from the float model's activations."""
    groups = {g[0].key: g for g in everything_edges(graph) if bits.of(graph, g[0]) != FLOAT}
    residual = residual_edges(graph)
    # the values of residual sums, not of the branches that they add
    sums = {("add", "output"), ("layer_norm", "input")} if run["loss"] == "token-norm" else set()
    by_token = {e.key for s in graph.sites for e in s.edges.values() if (s.kind, e.name) in sums}
    quantizers: dict[str, Quantizer] = {}

    def on_edge(edge: Edge, view: EdgeView) -> None:
        width, group = bits.of(graph, edge), groups[edge.key]
        keys, axis = {e.key for e in group}, None
        if run["operator"]:
            axis = -1 if keys <= residual else shift_axis(graph, group)
        if axis is not None:
            seen = view(axis=axis)
            made = add_alpha(seen, width, axis=axis, weights=token_weights(seen) if by_token & keys else None)
        elif edge.key.endswith(".probs.input"):
            made = scores_quantizer(view, width)
        elif edge.key.endswith(".probs.output"):
            seen = view(tail=1.0 - min(REPQ_QUANTILES))
            made = closest((affine(*mse(seen, width), width), log_by_quantile(seen, width)), seen.values)
        else:
            made = affine(*clipping(view(), width), width)
        quantizers.update(dict.fromkeys(keys, made))

    CalibrationPass(graph, calibration, sequential=False, seed=run.seed).run([g[0] for g in groups.values()], on_edge)
    return quantizers


def scores_quantizer(view: EdgeView, bits: int) -> Uniform:
    """Softmax inputs. A value more than ln 2·(b + 4) below its row's largest comes out as 0 and counts as lying
    there."""
    depth = math.log(2) * (bits + 4)
    pieces = view.tensors()
    observer = Observer(pieces=len(pieces))
    for piece in pieces:
        observer.update(torch.maximum(piece, piece.amax(-1, keepdim=True) - depth))
    return affine(*mse(observer.result(), bits), bits)
