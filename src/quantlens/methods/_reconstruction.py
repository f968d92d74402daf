"""What methods share that optimise block by block: their common options, the quantizers they start from, settings."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantlens.calibration import (
    Calibration,
    CalibrationPass,
    EdgeView,
    Observation,
    affine,
    clipping,
    closest,
    mse,
    quantile_mse,
)
from quantlens.formats import Quantizer, ShiftedLog
from quantlens.methods.base import PAPER, Departure, Edge, Graph, Option, Plan, Progress, Run, Widths, quantized_edges
from quantlens.methods.repq_vit import TAIL, Norms, norm_groups, reparameterize, rescale_norms
from quantlens.reconstruction import Loss, Settings, reconstruct

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
    "ranges of softmax outputs at the start count what a row's sum loses, besides the squared error",
    "soft rounding's regulariser weighs 0.005 for every weight beside a loss that starts at 1, as in the code of "
    "FIMA-Q and APHQ-ViT",
)

LR_SCALES, DROP = 0.01, 0.5
"""Learning rate of scales; probability that an element of an activation, or of a block's input, stays in float."""


CHECKPOINT = Option(None, "folder where finished blocks are stored, so that a killed run goes on")


def step_options(iterations: int, batch_size: int) -> dict[str, Option]:
    """Options of every reconstruction, whose paper has these."""
    return {
        "iterations": Option(
            80, f"steps per block, with {FULL} or more calibration images (the paper: {iterations})", least=0
        ),
        "batch_size": Option(8, f"images per step (the paper: {batch_size})", least=1),
        "checkpoint": CHECKPOINT,
    }


def portion(progress: Progress | None, number: int, of: int) -> Progress | None:
    """Progress of one of several equal parts."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, of * total)


def steps(run: Run, images: int, option: str = "iterations") -> int:
    """Steps per block: what was asked for; but for a paper's form in proportion to the images up to :data:`FULL`."""
    count = run[option]
    return count if run.options.get("variant") == PAPER else math.ceil(count * min(1.0, images / FULL))


def train(
    graph: Graph,
    plan: Plan,
    calibration: Calibration,
    run: Run,
    settings: Settings,
    *,
    reference: Graph | None = None,
    stage: str = "",
    part: tuple[int, int] = (0, 1),
    unrounded: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Reconstruct every block; what was reached, for the plan's notes. stage: folder of the checkpoint, where a method
    has several. part: of the progress (number, how many). unrounded: see :func:`reconstruct`."""
    folder = f"{run['checkpoint']}/{stage}" if stage and run["checkpoint"] else run["checkpoint"]
    told = portion(run.progress, *part)
    report = reconstruct(
        graph,
        plan,
        calibration,
        settings,
        seed=run.seed,
        reference=reference,
        progress=told,
        checkpoint=folder,
        unrounded=unrounded,
    )
    return report.info()


def drop_and_reconstruct(
    graph: Graph,
    plan: Plan,
    calibration: Calibration,
    run: Run,
    loss: str | Loss = "mse",
    *,
    reference: Graph | None = None,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Optimise rounding and scales together, with random dropping (QDrop)."""
    settings = Settings(
        optimise=("rounding", "scales"),
        loss=loss,
        inputs="mixed",
        input_drop=DROP,
        drop=DROP,
        iterations=steps(run, calibration.count),
        batch_size=run["batch_size"],
        lr_rounding=run["lr_rounding"],
        lr_scales=LR_SCALES,
        straight_through=run["straight_through"],
        guarded=run["guarded"],
    )
    plan.notes["reconstruction"] = train(graph, plan, calibration, run, settings, reference=reference, part=part)


def weight_quantizers(graph: Graph, bits: Widths) -> dict[str, Quantizer]:
    """Uniform per output channel, ranges of least squared error, on the target's grid, for every linear and conv
    layer."""
    found: dict[str, Quantizer] = {}
    for edge in quantized_edges(graph, bits):
        if edge.is_weight:
            width, rows = bits.of(graph, edge), graph.tensor(str(edge.value.target)).flatten(1)
            found[edge.key] = bits.weights(*mse(Observation.of(rows), width), width)
    return found


def activation_quantizers(
    graph: Graph,
    calibration: Calibration,
    bits: Widths,
    run: Run,
    *,
    reparameterized: bool = True,
    by_head: bool = True,
    shifted: bool = False,
) -> tuple[dict[str, Quantizer], Norms]:
    """Quantizers for the activations that matrix products read, on the float model's tensors; and, where LayerNorm
    outputs are reparameterized, the LayerNorms to be rewritten, by name.

    Asymmetric uniform, clipped for the least squared error. reparameterized: LayerNorm outputs have one scale after
    RepQ-ViT's exact rewriting: the quantizer is the one that holds after it (:func:`rescale_norms`); before, it is
    ``Reparameterization.channel``. by_head: the attention's operands have one scale per head. shifted: softmax outputs
    have I&S-ViT's shifted-log2 codes, which are not learned (else uniform ones in [0, t]).
    """
    groups = {f"{name}.input": group for name, group in norm_groups(graph).items()} if reparameterized else {}
    quantizers: dict[str, Quantizer] = {}
    norms: Norms = {}

    def on_edge(edge: Edge, view: EdgeView) -> None:
        width, heads = bits.of(graph, edge), by_head and _has_heads(graph, edge)
        where = BY_HEAD if heads else {}
        if edge.key in groups:
            group = groups[edge.key]
            if group.norm.name not in norms:
                low, high = quantile_mse(view(axis=-1, tail=TAIL), width)
                norms[group.norm.name] = group, reparameterize(low, high, width)
            quantizers[edge.key] = norms[group.norm.name][1].layer
        elif not edge.key.endswith(".probs.output"):
            quantizers[edge.key] = affine(*clipping(view(axis=-3 if heads else None), width), width, **where)
        elif shifted:
            quantizers[edge.key] = shifted_log(view, width)
        else:
            quantizers[edge.key] = affine(*softmax_range(view, width, heads), width, **where)

    edges = [e for e in quantized_edges(graph, bits) if not e.is_weight]
    CalibrationPass(graph, calibration, sequential=False, seed=run.seed).run(edges, on_edge)
    return quantizers, norms


def shifted_log(view: EdgeView, bits: int) -> Quantizer:
    """The shifted-log2 format with the least squared error over :data:`ETAS`; the range is the whole one."""
    seen = view()
    ends = torch.stack([seen.low.min(), seen.high.max()])
    return closest((ShiftedLog.covering(eta, ends, bits) for eta in ETAS), seen.values)


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
        index = torch.randperm(piece.shape[-2], generator=generator)[: max(1, piece.shape[-2] // ROW_SHARE)]
        pieces.append(piece.index_select(-2, index.to(piece.device)))
    rows = torch.cat(pieces)
    others = [d for d in range(rows.dim() - 1) if not (by_head and d == rows.dim() - 3)]
    top = rows.amax((*others, -1)).reshape(-1)
    candidates, errors = [top * factor for factor in torch.linspace(1.0, 0.05, SOFTMAX_RANGES).tolist()], []
    for candidate in candidates:
        error = affine(torch.zeros_like(top), candidate, bits, **where)(rows) - rows
        errors.append((error.square().sum(-1) + error.sum(-1).square()).mean(others).reshape(-1))
    best = torch.stack(candidates).gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]
    return torch.zeros_like(best), best


def started(
    graph: Graph,
    calibration: Calibration,
    bits: Widths,
    run: Run,
    *,
    reparameterized: bool = True,
    by_head: bool = True,
) -> Plan:
    """A plan with quantizers for weights and activations, LayerNorms rewritten (:func:`activation_quantizers`)."""
    activations, norms = activation_quantizers(
        graph, calibration, bits, run, reparameterized=reparameterized, by_head=by_head
    )
    rewrites = rescale_norms(graph, norms)
    return Plan({**weight_quantizers(graph, bits), **activations}, rewrites)


def _has_heads(graph: Graph, edge: Edge) -> bool:
    """Whether an edge's value is an operand of attention, [batch, heads, tokens, …]."""
    shape = edge.value.meta.get("shape")
    return graph.sites[edge.site].kind in ("scores", "probs", "context") and len(shape or ()) == 4
