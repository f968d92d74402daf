"""fima-q: FIMA-Q, post-training quantization of vision transformers by Fisher information matrix approximation (Wu et
al., CVPR 2025).

Block reconstruction as in QDrop (:mod:`quantlens.methods.qdrop`: AdaRound, LSQ, random dropping), with a loss that
knows what an error at a block's output does to the model's output:

1. The divergence of the model's output, KL(p ‖ p̂), has the Fisher matrix F as its Hessian at a block's output, and its
   gradient at the quantized block's output is g ≈ F·Δ, Δ the error there (section 3.2). Gradients and errors so tell F.
2. DPLR-FIM (section 3.3): F is a diagonal plus a matrix of low rank, both from k pairs (g, Δ): see
   :func:`quantlens.reconstruction.block_metrics.fisher_metrics`. Softmax temperature 20.
3. The loss of a block is the sum of both quadratic forms, each divided by its value at the start; at the logits the
   divergence itself.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from quantlens.calibration import Calibration
from quantlens.errors import QuantlensError
from quantlens.graph import Graph
from quantlens.methods._reconstruction import DROPPING_DEPARTURES, START_OPTIONS, dropping, start, step_options
from quantlens.methods.base import MATMUL_OPERANDS, Method, MethodInfo, Option, Run, Widths
from quantlens.qmodel import Plan
from quantlens.reconstruction import Metric, MetricLoss, fisher_metrics, reconstruct
from quantlens.reconstruction.block_metrics import DAMPING

DEPARTURES = (
    *DROPPING_DEPARTURES,
    "the k pairs are made before a block's training, from k groups of the images, the block quantized as at its "
    "start; theirs one after the other in its course, every 4000 steps, from all images",
    "the inverted matrix of the low-rank part is damped (damping): rows of magnitudes are nearly parallel, and the "
    "matrix that the authors' code inverts is nearly singular",
    "rank is 5, as in their configurations; the paper names 15 for some",
    "one scale per tensor, and one per head in attention; their configurations, but not the paper, give every token "
    "position a learned scale at the inputs of all products (token_scales=True: at the linear layers)",
    "ranges at the start have the least squared error; theirs the least error of each layer's output",
)


class FIMAQ(Method):
    info = MethodInfo(
        name="fima-q",
        title="FIMA-Q",
        paper="FIMA-Q: Post-Training Quantization for Vision Transformers by Fisher Information Matrix Approximation",
        venue="CVPR",
        year=2025,
        url="https://arxiv.org/abs/2506.11543",
        quantizes=MATMUL_OPERANDS,
        summary="block reconstruction with random dropping; the loss a diagonal plus low-rank Fisher matrix",
        departures=DEPARTURES,
        aliases=("fimaq", "fima"),
        options={
            **START_OPTIONS,
            "loss": Option(
                "dplr",
                "Fisher matrix of the loss: diagonal plus low rank (dplr, the paper), one of both, or none (mse)",
                ("dplr", "diagonal", "low-rank", "mse"),
            ),
            "rank": Option(5, "rank of the low-rank part, and groups of images that it is made of"),
            "damping": Option(DAMPING, "added to the inverted matrix, as a share of its mean diagonal"),
            **step_options("the paper: 20000, with 1024 images"),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        rank, damping = run["rank"], float(run["damping"])
        if not isinstance(rank, int) or rank < 1 or not damping > 0:
            raise QuantlensError(
                f"fima-q: rank={rank}, damping={damping}: give a rank of at least 1, a damping above 0"
            )
        quantizers, rewrites = start(graph, calibration, bits, run)
        metrics: dict[str, Metric] = {}
        if run["loss"] != "mse":
            metrics = fisher_metrics(graph, quantizers, calibration, rank=rank, damping=damping)
            metrics = {name: chosen(metric, run["loss"]) for name, metric in metrics.items()}
        plan = Plan(quantizers, rewrites)
        report = reconstruct(
            graph,
            plan,
            calibration,
            dropping("fima-q", run, calibration.count, MetricLoss(metrics)),
            seed=run.seed,
            progress=run.progress,
            checkpoint=run["checkpoint"],
        )
        plan.notes["reconstruction"] = report.info()
        return plan


def chosen(metric: Metric, parts: str) -> Metric:
    """The metric with both parts ("dplr"), or one of them."""
    if parts == "diagonal":
        return replace(metric, factors=None)
    return replace(metric, diagonal=torch.zeros_like(metric.diagonal)) if parts == "low-rank" else metric
