"""aocq: adaptive outlier correction quantization (Li et al., FITEE 26(10):1879–1895, 2025).

A fully quantized vision transformer (LayerNorm inputs, residual sums, softmax and GELU inputs too), whose channels and
tokens differ too much in size for one scale, is corrected at three levels:

* operator level: Add_α and LN_α balance the channels by an equivalent transformation;
* framework level: block by block, stage one refines the activations' scales in successive steps, s₀ → s₄, then stage
  two optimises the direction in which weights are rounded, with the imbalance moved into the weights;
* loss level: the block-wise reconstruction loss has a token norm that suppresses extreme tokens.

Of the paper, the abstract, figures and tables alone are public: the formulas are derived here (docs/aocq.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.calibration import Calibration, CalibrationPass, EdgeView, Observation, Observer, Transform
from quantlens.calibration.ranges import affine, clipping, log_by_quantile, mse
from quantlens.calibration.ranges.power_of_two import token_weights
from quantlens.calibration.ranges.rules import REPQ_QUANTILES
from quantlens.errors import QuantlensError
from quantlens.formats import PowerOfTwo, Quantizer, Uniform
from quantlens.formats.base import bounded_
from quantlens.formats.uniform import MAX_ZERO_POINT
from quantlens.graph import Edge, Graph
from quantlens.graph.graph import VIEWS, op_name
from quantlens.methods._reconstruction import CHECKPOINT, FULL, portion, weight_quantizers
from quantlens.methods._shifts import shift_axis
from quantlens.methods.base import EVERYTHING, Method, MethodInfo, Option, Run, Widths, everything_edges
from quantlens.qmodel import Plan
from quantlens.qmodel.bits import FLOAT
from quantlens.reconstruction import Report, Settings, reconstruct
from quantlens.transforms import NormGroup, find_norm_groups
from quantlens.transforms.equalisation import Factors, balance, columns, equalise_norms, smooth_factors
from quantlens.transforms.norms import keeps_channels_last

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""m of LN_α's candidates: how far the channels' ranges are evened out."""
ROWS = 1024
"""Tokens on which LN_α's candidates are compared."""
EXPONENTS = 7
"""Largest shift of Add_α."""
ROUNDS = 4
"""s₀ → s₄."""

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
        version=2,
        arguments={"outlier_channels": "split"},
        options={
            "operator": Option(True, "level one: LN_α and Add_α balance the channels", (True, False)),
            "scales": Option(True, "level two, stage one: activation scales refined, s₀ → s₄", (True, False)),
            "rounding": Option(True, "level two, stage two: rounding of the weights learned", (True, False)),
            "loss": Option("token-norm", "level three: token-norm, or plain mse", ("token-norm", "mse")),
            "iterations": Option(80, f"steps per block in stage two, with {FULL} or more calibration images"),
            "scale_iterations": Option(32, f"steps per block in stage one, over all {ROUNDS} rounds; likewise"),
            "batch_size": Option(8, "images per step"),
            "checkpoint": CHECKPOINT,
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        rewrites = []
        if run["operator"]:
            done = balance_norms(graph, calibration, bits, run.seed)
            rewrites.append(f"LN_α: channels balanced at {len(done)} LayerNorms")
        activations = activation_quantizers(graph, calibration, bits, run)
        weights = weight_quantizers(graph, bits)
        stages = [s for s in ("scales", "rounding") if run[s]]
        reports: dict[str, Report] = {}
        plan = Plan(activations)
        for number, stage in enumerate(stages):
            if stage == "rounding":
                plan.quantizers |= weights
            settings = stage_settings(stage, calibration.count, run)
            folder = f"{run['checkpoint']}/{stage}" if run["checkpoint"] else None
            progress = portion(run.progress, number, len(stages))
            reports[stage] = reconstruct(
                graph, plan, calibration, settings, seed=run.seed, progress=progress, checkpoint=folder
            )
        plan.quantizers = {**weights, **plan.quantizers}
        plan.rewrites = rewrites
        plan.notes["reconstruction"] = {stage: report.info() for stage, report in reports.items()}
        return plan


def stage_settings(stage: str, images: int, run: Run) -> Settings:
    """Settings of stage one ("scales") or two ("rounding")."""
    steps = run["scale_iterations"] if stage == "scales" else run["iterations"]
    if not isinstance(steps, int) or steps < 0 or not isinstance(run["batch_size"], int) or run["batch_size"] < 1:
        raise QuantlensError("aocq: iterations are whole numbers from 0 on, batch_size from 1 on")
    steps = math.ceil(steps * min(1.0, images / FULL))
    common: dict[str, Any] = {"loss": run["loss"], "batch_size": run["batch_size"], "iterations": steps}
    if stage == "scales":
        return Settings(optimise=("scales",), inputs="quantized", rounds=ROUNDS, lr_scales=0.003, **common)
    return Settings(optimise=("rounding",), inputs="mixed", straight_through=True, lr_rounding=0.03, **common)


# -- level one: LN_α -----------------------------------------------------------------------------------------------
def balance_norms(graph: Graph, calibration: Calibration, bits: Widths, seed: int) -> list[str]:
    """LN_α at every LayerNorm that feeds linear layers alone, exactly. Returns the norms changed."""
    groups = {g.norm.edges["output"].key: g for g in find_norm_groups(graph)}
    edges = [g.norm.edges["output"] for g in groups.values()]
    factors: dict[str, Factors] = {}
    generator = torch.Generator().manual_seed(seed)

    def on_edge(edge: Edge, view: EdgeView) -> None:
        rows = _sample(view.tensors(), generator)
        factors[groups[edge.key].norm.name] = ln_alpha(graph, groups[edge.key], view(axis=-1), rows, bits)

    edges = [e for e in edges if bits.of(graph, e) != FLOAT]
    CalibrationPass(graph, calibration, sequential=False, seed=seed).run(edges, on_edge)
    return equalise_norms(graph, list(groups.values()), factors)


def ln_alpha(graph: Graph, group: NormGroup, seen: Observation, rows: Tensor, bits: Widths) -> Factors:
    """Of all candidates, the factors with the least squared error of the linear layers' outputs.

    seen: the LayerNorm's output by channel. rows: [n, C] a sample of it.
    """
    width = bits.of(graph, group.norm.edges["output"])
    weight_width = bits.of(graph, group.linears[0].edges["weight"])
    weight = torch.cat([graph.tensor(str(linear.weight)) for linear in group.linears])
    expected = rows @ weight.T
    half, middle = (seen.high - seen.low) / 2, (seen.high + seen.low) / 2
    candidates = [balance(seen.low, seen.high, m) for m in STRENGTHS]
    for m in STRENGTHS[1:-1]:
        scale = smooth_factors(half, columns(graph, group), m)
        candidates.append(Factors(scale, middle / scale))
    best, least = balance(seen.low, seen.high, 0.0, shift=False), math.inf
    for candidate in candidates:
        low = (seen.low / candidate.scale - candidate.shift).min()
        high = (seen.high / candidate.scale - candidate.shift).max()
        x = affine(low, high, width)(rows / candidate.scale - candidate.shift) + candidate.shift
        w = weight * candidate.scale
        if weight_width != FLOAT:
            ends = mse(Observation.of(w), weight_width, steps=10, shrink=0.05)
            w = affine(*ends, weight_width, granularity="channel", axis=0)(w)
        error = float((x @ w.T - expected).square().sum())
        if error < least:
            best, least = candidate, error
    return best


def _sample(tensors: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """About :data:`ROWS` tokens [n, C], as many from each piece."""
    share = -(-ROWS // len(tensors))
    rows = []
    for part in tensors:
        flat = part.reshape(-1, part.shape[-1])
        index = torch.randperm(len(flat), generator=generator)[:share]
        rows.append(flat[index.to(flat.device)])
    return torch.cat(rows)


# -- level one: Add_α ----------------------------------------------------------------------------------------------
def residual_edges(graph: Graph) -> set[str]:
    """Keys of the edges whose value a residual sum reads or makes, or a LayerNorm reads, channels last: at the reader,
    and at the layer that made it (operations that only move tokens may lie between)."""
    by_node = {site.node: site for site in graph.sites}
    found: set[str] = set()
    for site in graph.sites.of_kind("layer_norm", "add"):
        for edge in site.edges.values():
            if edge.position is None:
                if site.kind == "add":
                    found.add(edge.key)
                continue
            found.add(edge.key)
            node: Any = edge.value
            while node not in by_node and op_name(node) in VIEWS and isinstance(node.args[0], fx.Node):
                if not keeps_channels_last(node, node.args[0]):
                    break
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

    def zeros(step: Tensor | float) -> Tensor:
        return (last / 2 - middle / step).round()

    best, least = (finest, torch.zeros_like(low)), math.inf
    for scale in (finest * 2 ** (i / 4) for i in range(-3, 2)):
        errors = []
        for k in range(EXPONENTS + 1):
            step = scale * 2**k
            z = zeros(step)[:, None]
            error = bounded_((values / step).round_(), -z, last - z).mul_(step).sub_(values)
            errors.append(error.square_() @ mean)
        error, exponents = torch.stack(errors).min(0)
        if float(error.sum()) < least:
            best, least = (scale, exponents), float(error.sum())
    scale, exponents = best
    z = zeros(scale * torch.exp2(exponents.float()))
    return PowerOfTwo(torch.tensor(scale, device=low.device), exponents, z, bits, axis=axis)


# -- starting point ------------------------------------------------------------------------------------------------
def activation_quantizers(graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> dict[str, Quantizer]:
    """s₀: a quantizer for every group of :func:`everything_edges`, from the float model's activations."""
    groups = {g[0].key: g for g in everything_edges(graph) if bits.of(graph, g[0]) != FLOAT}
    residual = residual_edges(graph) if run["operator"] else set()
    by_token: set[str] = set()
    if run["loss"] == "token-norm":  # the values of residual sums, not of the branches that they add
        by_token = {s.edges["output"].key for s in graph.sites.of_kind("add")}
        by_token |= {s.edges["input"].key for s in graph.sites.of_kind("layer_norm")}
    quantizers: dict[str, Quantizer] = {}

    def on_edge(edge: Edge, view: EdgeView) -> Transform | None:
        width, group = bits.of(graph, edge), groups[edge.key]
        axis = -1 if all(e.key in residual for e in group) else shift_axis(graph, group) if run["operator"] else None
        if axis is not None:
            seen = view(axis=axis)
            weights = token_weights(seen) if by_token & {e.key for e in group} else None
            made: Quantizer = add_alpha(seen, width, axis=axis, weights=weights)
        elif edge.key.endswith(".probs.input"):
            made = scores_quantizer(view, width)
        elif edge.key.endswith(".probs.output"):
            made = probs_quantizer(view, width)
        else:
            made = affine(*clipping(view(), width), width)
        quantizers.update({e.key: made for e in group})
        return None

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


def probs_quantizer(view: EdgeView, bits: int) -> Quantizer:
    """Softmax outputs: uniform or log√2, whichever has the smaller squared error."""
    seen = view(tail=1.0 - min(REPQ_QUANTILES))
    return min(
        (affine(*mse(seen, bits), bits), log_by_quantile(seen, bits)),
        key=lambda q: float((q(seen.values) - seen.values).square().sum()),
    )
