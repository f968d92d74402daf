"""What methods share that optimise block by block: their common options, the quantizers they start from, settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlens.calibration import Calibration, CalibrationPass, EdgeView, Observation, Replacement
from quantlens.calibration.ranges import affine, clipping, mse, quantile_mse
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer, ShiftedLog
from quantlens.graph import Edge, Graph
from quantlens.methods.base import PAPER, Departure, Option, Progress, Run, Widths, matmul_operand_edges
from quantlens.methods.repq_vit import TAIL, Reparameterization, norm_groups, reparameterize, rescale_norms
from quantlens.qmodel import Plan
from quantlens.qmodel.bits import FLOAT
from quantlens.reconstruction import Loss, Settings, reconstruct
from quantlens.transforms import NormGroup

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

GUARDED = Departure("guarded", True, False, "a block whose loss on all calibration images did not fall keeps its start")

DEPARTURES = (
    Departure("iterations", 80, 20_000, f"steps per block, here fewer in proportion below {FULL} images"),
    Departure("batch_size", 8, 32, "images per step"),
    Departure(
        "straight_through",
        True,
        False,
        "AdaRound's gradient passes straight through the hard direction, which needs no regulariser; the paper's "
        "direction is soft, and a regulariser anneals it to a hard one",
    ),
    Departure("lr_rounding", 0.03, 0.001, "learning rate of the rounding (Adam): it falls to 0; the paper's stays"),
    GUARDED,
)
"""Where all methods with random dropping depart from their papers."""

HOURS = "which takes minutes on a CPU; the paper's steps take hours"
"""Why methods that train are not as in their papers by default."""

READINGS = (
    "the images are those that are given; the papers take 1024",
    "learning rates of scales are relative to the scale; their gradient has LSQ's factor",
)

LR_SCALES, DROP = 0.01, 0.5
"""Learning rate of scales; probability that an element of an activation, or of a block's input, stays in float."""


CHECKPOINT = Option(None, "folder where finished blocks are stored, so that a killed run goes on")


def step_options(iterations: int, batch_size: int) -> dict[str, Option]:
    """Options of every reconstruction, whose paper has these."""
    return {
        "iterations": Option(80, f"steps per block, with {FULL} or more calibration images (the paper: {iterations})"),
        "batch_size": Option(8, f"images per step (the paper: {batch_size})"),
        "checkpoint": CHECKPOINT,
    }


@dataclass(frozen=True)
class Start:
    """How activations are quantized at first. reparameterized: LayerNorm outputs have one scale after RepQ-ViT's exact
    rewriting (else without). by_head: q, k, v and softmax outputs have one scale per head. shifted: softmax outputs
    have I&S-ViT's shifted-log2 codes, which are not learned (else uniform ones)."""

    reparameterized: bool = True
    by_head: bool = True
    shifted: bool = False


def portion(progress: Progress | None, number: int, of: int) -> Progress | None:
    """Progress of one of several equal parts."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, of * total)


def steps(method: str, run: Run, images: int, option: str = "iterations") -> int:
    """Steps per block: what was asked for; but for a paper's form in proportion to the images up to :data:`FULL`.
    Raises QuantlensError for numbers that are none."""
    count, size = run[option], run["batch_size"]
    if not isinstance(count, int) or count < 0 or not isinstance(size, int) or size < 1:
        raise QuantlensError(f"{method}: {option} is a whole number from 0 on, batch_size from 1 on")
    return count if run.options.get("variant") == PAPER else math.ceil(count * min(1.0, images / FULL))


def drop_and_reconstruct(
    method: str,
    graph: Graph,
    plan: Plan,
    calibration: Calibration,
    run: Run,
    loss: str | Loss = "mse",
    *,
    reference: Graph | None = None,
) -> None:
    """Optimise rounding and scales together, with random dropping (QDrop)."""
    settings = Settings(
        optimise=("rounding", "scales"),
        loss=loss,
        inputs="mixed",
        input_drop=DROP,
        drop=DROP,
        iterations=steps(method, run, calibration.count),
        batch_size=run["batch_size"],
        lr_rounding=run["lr_rounding"],
        lr_scales=LR_SCALES,
        straight_through=run["straight_through"],
        guarded=run["guarded"],
    )
    report = reconstruct(
        graph,
        plan,
        calibration,
        settings,
        seed=run.seed,
        reference=reference,
        progress=run.progress,
        checkpoint=run["checkpoint"],
    )
    plan.notes["reconstruction"] = report.info()


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
    graph: Graph, calibration: Calibration, bits: Widths, run: Run, start: Start
) -> tuple[dict[str, Quantizer], dict[str, tuple[NormGroup, Reparameterization]]]:
    """Quantizers for the activations that matrix products read, on the float model's tensors; and, where LayerNorm
    outputs are reparameterized, the LayerNorms to be rewritten, by name.

    Asymmetric uniform, clipped for the least squared error, softmax outputs in [0, t] or shifted-log2. At a LayerNorm
    to be rewritten the quantizer is the one that holds after the rewriting (:func:`rescale_norms`); before, it is
    ``Reparameterization.channel``.
    """
    groups = norm_groups(graph) if start.reparameterized else {}
    groups = {f"{name}.input": group for name, group in groups.items()}
    quantizers: dict[str, Quantizer] = {}
    norms: dict[str, tuple[NormGroup, Reparameterization]] = {}

    def on_edge(edge: Edge, view: EdgeView) -> Replacement | None:
        width = bits.of(graph, edge)
        if edge.key in groups:
            group = groups[edge.key]
            if group.norm.name not in norms:
                low, high = quantile_mse(view(axis=-1, tail=TAIL), width)
                norms[group.norm.name] = group, reparameterize(low, high, width)
            quantizers[edge.key] = norms[group.norm.name][1].layer
        else:
            by_head = start.by_head and _has_heads(graph, edge)
            if edge.key.endswith(".probs.output"):
                ends = None if start.shifted else softmax_range(view, width, by_head)
            else:
                ends = clipping(view(axis=-3 if by_head else None), width)
            where = BY_HEAD if by_head else {}
            quantizers[edge.key] = shifted_log(view, width) if ends is None else affine(*ends, width, **where)
        return None

    edges = [e for e in matmul_operand_edges(graph) if not e.is_weight and bits.of(graph, e) != FLOAT]
    CalibrationPass(graph, calibration, sequential=False, seed=run.seed).run(edges, on_edge)
    return quantizers, norms


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


def started(
    graph: Graph, calibration: Calibration, bits: Widths, run: Run, start: Start
) -> tuple[dict[str, Quantizer], list[str]]:
    """Quantizers for weights and activations, LayerNorms rewritten, and sentences on the rewriting."""
    activations, norms = activation_quantizers(graph, calibration, bits, run, start)
    rewrites = rescale_norms(graph, norms)
    return {**weight_quantizers(graph, bits), **activations}, rewrites


def _has_heads(graph: Graph, edge: Edge) -> bool:
    """Whether an edge's value is an operand of attention, [batch, heads, tokens, …]."""
    shape = edge.value.meta.get("shape") if edge.position is not None else edge.node.meta.get("shape")
    return graph.sites[edge.site].kind in ("scores", "probs", "context") and len(shape or ()) == 4
