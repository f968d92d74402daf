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

from quantlens.methods._reconstruction import (
    DEPARTURES,
    HOURS,
    READINGS,
    drop_and_reconstruct,
    started,
    step_options,
)
from quantlens.methods.base import MATMUL_OPERANDS, Calibration, Graph, Method, MethodInfo, Option, Plan, Run, Widths
from quantlens.reconstruction import MetricLoss, fisher_metrics


class FIMAQ(Method):
    info = MethodInfo(
        name="fima-q",
        title="FIMA-Q",
        paper="FIMA-Q: Post-Training Quantization for Vision Transformers by Fisher Information Matrix Approximation",
        venue="CVPR",
        year=2025,
        url="https://arxiv.org/abs/2506.11543",
        quantizes=MATMUL_OPERANDS,
        version=4,
        summary="block reconstruction with random dropping; the loss a diagonal plus low-rank Fisher matrix",
        departures=DEPARTURES,
        readings=(
            *READINGS,
            "the k pairs are made before a block's training, from k groups of the images, the block quantized as at "
            "its start; the authors' code makes them one after the other in its course, from all images",
            "the inverted matrix of the low-rank part is damped: rows of magnitudes are nearly parallel",
            "rank is 5, as in their configurations; the paper names 15 for some",
            "one scale per tensor, and one per head in attention; their configurations, but not the paper, have one "
            "for every token position, and of v for every channel of a head",
            "ranges at the start have the least squared error; theirs the least error of each layer's output",
        ),
        because=HOURS,
        aliases=("fimaq", "fima"),
        options={
            "rank": Option(5, "rank of the low-rank part, and groups of images that it is made of", least=1),
            **step_options(20_000, 32),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        plan = started(graph, calibration, bits, run)
        metrics = fisher_metrics(graph, plan.quantizers, calibration, rank=run["rank"], outputs=run.outputs)
        drop_and_reconstruct(graph, plan, calibration, run, MetricLoss(metrics, run.outputs))
        return plan
