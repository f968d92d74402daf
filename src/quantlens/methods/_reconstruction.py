"""What methods share that optimise block by block: their common options, the quantizers they start from, settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantlens.calibration import Calibration, CalibrationPass, EdgeView, Observation, Transform
from quantlens.calibration.ranges import affine, clipping, log_by_quantile, mse, quantile_mse
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer, ShiftedLog, Uniform
from quantlens.graph import Edge, Graph
from quantlens.methods.base import Option, Progress, Run, Widths, matmul_operand_edges
from quantlens.methods.repq_vit import TAIL, Reparameterization, reparameterize
from quantlens.qmodel.bits import FLOAT
from quantlens.reconstruction import Settings
from quantlens.transforms import NormGroup, find_norm_groups, rescale_norm

FULL = 32
"""Calibration images from which on a block gets all the steps asked for; fewer images get fewer steps in proportion,
because they are seen as often."""

ETAS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Candidates of the shift."""

BY_HEAD: dict[str, Any] = {"granularity": "head", "axis": -3}

ROW_SHARE = 8
"""One of so many rows of a softmax output is looked at for its range."""

SOFTMAX_RANGES = 39
"""Candidates for the range of a softmax output."""

START_OPTIONS = {
    "layernorm": Option(
        "reparameterized",
        "LayerNorm outputs have one scale, after RepQ-ViT's exact rewriting (reparameterized) or without (tensor)",
        ("reparameterized", "tensor"),
    ),
    "attention": Option(
        "head", "q, k, v and softmax outputs: one scale per head, or one per tensor", ("head", "tensor")
    ),
    "softmax": Option(
        "uniform",
        "softmax outputs: uniform, log-sqrt2 (RepQ-ViT's; not learned), or shifted-log2 (I&S-ViT's; not learned)",
        ("uniform", "log-sqrt2", "shifted-log2"),
    ),
    "token_scales": Option(
        False,
        "inputs of linear layers: a scale per position of a token (FIMA-Q's code)",
        (True, False),
    ),
}
"""Granularities on which authors' code differs, most often without a word in the paper; with equal defaults."""

DROPPING_DEPARTURES = (
    f"80 steps per block, on what images are given (fewer in proportion below {FULL}), AdaRound's gradient straight "
    "through the hard direction, which needs no regulariser, instead of 20 000 steps with 1024 images; rounding=soft "
    "iterations=20000 batch_size=32 lr_rounding=0.001 is that schedule",
    "learning rates of scales are relative to the scale; their gradient has LSQ's factor",
    "a block whose loss on all calibration images did not fall keeps its start",
)
"""Where all methods with random dropping depart from their papers."""

CHECKPOINT = Option(None, "folder where finished blocks are stored, so that a killed run goes on")


def step_options(paper: str) -> dict[str, Option]:
    """Options of a QDrop-type reconstruction. paper: what the paper takes, as part of a sentence."""
    return {
        "iterations": Option(80, f"steps per block, with {FULL} or more calibration images ({paper})"),
        "batch_size": Option(8, "images per step (the paper: 32)"),
        "lr_rounding": Option(0.03, "learning rate (Adam) of the rounding, falling to 0 (the paper: 0.001, constant)"),
        "lr_scales": Option(0.01, "learning rate (Adam) of activations' scales, relative to the scale, falling to 0"),
        "drop": Option(0.5, "probability that an activation's element is left in float in training"),
        "input_drop": Option(0.5, "probability that an element of a block's input is the float model's"),
        "rounding": Option(
            "straight-through",
            "AdaRound with the hard direction in the forward pass (straight-through), or soft with a regulariser that "
            "anneals to a hard rounding (soft, the paper; wants thousands of steps)",
            ("straight-through", "soft"),
        ),
        "checkpoint": CHECKPOINT,
    }


def portion(progress: Progress | None, number: int, of: int) -> Progress | None:
    """Progress of one of several equal parts."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, of * total)


def steps(method: str, run: Run, images: int, option: str = "iterations") -> int:
    """Steps per block: what was asked for, in proportion to the images up to :data:`FULL`. Raises QuantlensError for
    numbers that are none."""
    count, size = run[option], run["batch_size"]
    if not isinstance(count, int) or count < 0 or not isinstance(size, int) or size < 1:
        raise QuantlensError(f"{method}: {option} is a whole number from 0 on, batch_size from 1 on")
    return math.ceil(count * min(1.0, images / FULL))


def dropping(method: str, run: Run, images: int, loss: Any) -> Settings:
    """Settings that optimise rounding and scales together, with random dropping (QDrop)."""
    return Settings(
        optimise=("rounding", "scales"),
        loss=loss,
        inputs="mixed",
        input_drop=float(run["input_drop"]),
        drop=float(run["drop"]),
        iterations=steps(method, run, images),
        batch_size=run["batch_size"],
        lr_rounding=float(run["lr_rounding"]),
        lr_scales=float(run["lr_scales"]),
        straight_through=run["rounding"] == "straight-through",
    )


# -- where a method starts from ------------------------------------------------------------------------------------
def weight_quantizers(graph: Graph, bits: Widths) -> dict[str, Quantizer]:
    """Uniform per output channel, ranges of least squared error, on the target's grid, for every linear and conv
    layer."""
    found: dict[str, Quantizer] = {}
    for site in graph.sites.of_kind("linear", "conv"):
        edge = site.edges["weight"]
        width = bits.of(graph, edge)
        if width != FLOAT:
            rows = graph.tensor(str(site.weight)).flatten(1)
            found[edge.key] = bits.weights(*mse(Observation.of(rows), width), width)
    return found


def activation_quantizers(
    graph: Graph, calibration: Calibration, bits: Widths, run: Run
) -> tuple[dict[str, Quantizer], dict[str, tuple[NormGroup, Reparameterization]]]:
    """Quantizers for the activations that matrix products read, on the float model's tensors, following
    :data:`START_OPTIONS`; and, for ``layernorm=reparameterized``, the LayerNorms to be rewritten, by name.

    Asymmetric uniform, clipped for the least squared error, softmax outputs as in :func:`softmax_quantizer`. At a
    LayerNorm to be rewritten the quantizer is the one that holds after the rewriting (:func:`rewrite`); before, it is
    ``Reparameterization.channel``.
    """
    heads = {site.name for site in graph.sites.head}
    groups: dict[str, NormGroup] = {}
    if run["layernorm"] == "reparameterized":
        for group in find_norm_groups(graph):
            if not any(linear.name in heads for linear in group.linears):
                groups |= {f"{linear.name}.input": group for linear in group.linears}
    quantizers: dict[str, Quantizer] = {}
    norms: dict[str, tuple[NormGroup, Reparameterization]] = {}

    def on_edge(edge: Edge, view: EdgeView) -> Transform | None:
        width = bits.of(graph, edge)
        if edge.key in groups:
            group = groups[edge.key]
            if group.norm.name not in norms:
                low, high = quantile_mse(view(axis=-1, tail=TAIL), width)
                norms[group.norm.name] = group, reparameterize(low, high, width)
            quantizers[edge.key] = norms[group.norm.name][1].layer
        else:
            by_head = run["attention"] == "head" and _has_heads(graph, edge)
            if edge.key.endswith(".probs.output"):
                quantizers[edge.key] = softmax_quantizer(view, width, run["softmax"], by_head=by_head)
            else:
                ends = clipping(view(axis=-3 if by_head else None), width)
                quantizers[edge.key] = affine(*ends, width, **(BY_HEAD if by_head else {}))
        return None

    edges = [e for e in matmul_operand_edges(graph) if not e.is_weight and bits.of(graph, e) != FLOAT]
    CalibrationPass(graph, calibration, sequential=False, seed=run.seed).run(edges, on_edge)
    if run["token_scales"]:
        quantizers |= {e.key: by_token(quantizers[e.key], e) for e in edges if graph.sites[e.site].kind == "linear"}
    return quantizers, norms


def softmax_quantizer(view: EdgeView, bits: int, how: str, *, by_head: bool) -> Quantizer:
    """Softmax outputs: "uniform", or per tensor "log-sqrt2" or "shifted-log2"."""
    if how == "log-sqrt2":
        return log_by_quantile(view(tail=TAIL), bits)
    if how == "shifted-log2":
        return shifted_log(view, bits)
    return affine(*softmax_range(view, bits, by_head), bits, **(BY_HEAD if by_head else {}))


def shifted_log(view: EdgeView, bits: int) -> Quantizer:
    """The shifted-log2 format with the least squared error over :data:`ETAS`; the range is the whole one."""
    seen = view()
    ends = torch.stack([seen.low.min(), seen.high.max()])
    candidates = [ShiftedLog.covering(eta, ends, bits) for eta in ETAS]
    errors = [float((q(seen.values) - seen.values).square_().sum()) for q in candidates]
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def softmax_range(view: EdgeView, bits: int, by_head: bool) -> tuple[Tensor, Tensor]:
    """The range [0, t] of softmax outputs, [1] or by head [H], with the least mean of Σ e² + (Σ e)² over rows, e the
    errors of a row.

    That is the error of the row's product with values of equal mean square and variance. Squares alone let the many
    small probabilities go, which make up much of the row's sum; what is lost of it is lost in every channel.
    """
    generator = torch.Generator().manual_seed(0)
    where = BY_HEAD if by_head else {}
    pieces = []
    for piece in view.tensors():
        count = piece.shape[-2]
        index = torch.randperm(count, generator=generator)[: max(1, count // ROW_SHARE)]
        pieces.append(piece.index_select(-2, index.to(piece.device)))
    rows = torch.cat(pieces)
    others = [d for d in range(rows.dim() - 1) if not (by_head and d == rows.dim() - 3)]
    top = rows.amax((*others, -1)).reshape(-1)
    best, least = top, torch.full_like(top, math.inf)
    for factor in torch.linspace(1.0, 0.05, SOFTMAX_RANGES).tolist():
        error = affine(torch.zeros_like(top), top * factor, bits, **where)(rows) - rows
        total = (error.square().sum(-1) + error.sum(-1).square()).mean(others).reshape(-1)
        best, least = torch.where(total < least, top * factor, best), torch.minimum(total, least)
    return torch.zeros_like(best), best


def rewrite(graph: Graph, norms: Mapping[str, tuple[NormGroup, Reparameterization]]) -> list[str]:
    """Rewrite the LayerNorms; sentences for the plan."""
    for group, found in norms.values():
        rescale_norm(graph, group, found.scale, found.shift)
    return [f"LayerNorm outputs reparameterized from channel- to layer-wise at {len(norms)} norms"] if norms else []


def start(graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> tuple[dict[str, Quantizer], list[str]]:
    """Quantizers for weights and activations, LayerNorms rewritten, and sentences on the rewriting."""
    activations, norms = activation_quantizers(graph, calibration, bits, run)
    rewrites = rewrite(graph, norms)
    return {**weight_quantizers(graph, bits), **activations}, rewrites


def by_token(quantizer: Quantizer, edge: Edge) -> Quantizer:
    """The quantizer with a scale of its own for every token's position, all equal; itself where the edge's value is
    not [batch, tokens, channels] with a fixed number of tokens."""
    shape: tuple[int | None, ...] = edge.value.meta.get("shape") or ()
    if len(shape) != 3 or shape[1] is None or not isinstance(quantizer, Uniform) or quantizer.axis is not None:
        return quantizer
    scale, zero = quantizer.scale.expand(shape[1]), quantizer.zero_point.expand(shape[1])
    return Uniform(scale, zero, quantizer.bits, signed=quantizer.signed, granularity="token", axis=-2)


def _has_heads(graph: Graph, edge: Edge) -> bool:
    """Whether an edge's value is an operand of attention, [batch, heads, tokens, …]."""
    shape = edge.value.meta.get("shape") if edge.position is not None else edge.node.meta.get("shape")
    return graph.sites[edge.site].kind in ("scores", "probs", "context") and len(shape or ()) == 4
