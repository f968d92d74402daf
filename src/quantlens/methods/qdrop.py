"""qdrop: QDrop, randomly dropping quantization for extremely low-bit post-training quantization (Wei et al., ICLR
2022), on top of BRECQ's block reconstruction (Li et al., ICLR 2021).

Blocks are reconstructed one after the other, each on the output of the quantized ones before it, towards the float
model's output (BRECQ, section 3.2), by squared error:

1. Weights: the direction of every rounding is learned (AdaRound). Activations: the step sizes are learned (LSQ), both
   together.
2. In every step, each element of every activation is quantized with probability ½ and left in float otherwise, and each
   element of the block's input is the quantized prefix's or the float model's, likewise (section 3.3). The weights are
   so tuned for a flat loss around the quantized activations, which lowers the error on other images than the
   calibration's.
3. Afterwards everything is quantized.

The paper is about convolutional networks. Two implementations for vision transformers circulate, whose published
figures differ by up to 45 points. Where the papers' code differs from this file, or is silent:

1. Steps. They take 20 000 per block, with 1024 images. Here ``iterations`` is 80, on what images are given: AdaRound's
   gradient is taken straight through the hard direction (``rounding``), which needs no regulariser and settles in some
   hundred steps. ``rounding=soft iterations=20000 batch_size=32 lr_rounding=0.001`` is the paper's schedule.
2. Learning rates are relative: of scales as multiples of their start. The scales' gradient has LSQ's factor.
3. Starting point, in the manner of the re-implementations of APHQ-ViT and FIMA-Q: LayerNorm outputs rewritten as by
   RepQ-ViT (``layernorm``), the attention's operands with one scale per head (``attention``). Softmax outputs are
   uniform.
4. Ranges are those of least squared error; the paper's exponent is 2.4.
5. First and last layer: the image at ``patch_bits``, all else as asked for (theirs: 8 bits; ``head_bits=8``).
6. A block whose loss on all calibration images did not fall keeps its start.
7. With so few steps dropping does not pay everywhere: on the shipped model (digits, W4A4, 32 images, one seed) the
   divergence from the float model is 0.020 with it and 0.010 with ``drop=0 input_drop=0``.
"""

from __future__ import annotations

from quantlens.calibration import Calibration
from quantlens.graph import Graph
from quantlens.methods._reconstruction import START_OPTIONS, dropping, start, step_options
from quantlens.methods.base import MATMUL_OPERANDS, Method, MethodInfo, Run, Widths
from quantlens.qmodel import Plan
from quantlens.reconstruction import reconstruct


class QDrop(Method):
    info = MethodInfo(
        name="qdrop",
        title="QDrop",
        paper="QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization",
        venue="ICLR",
        year=2022,
        url="https://arxiv.org/abs/2203.05740",
        quantizes=MATMUL_OPERANDS,
        summary="block reconstruction with activation quantization dropped at random; learned rounding and scales",
        departures="80 straight-through steps per block instead of 20000; LayerNorm outputs rewritten and scales per "
        "head at the start",
        aliases=("q-drop",),
        options={**START_OPTIONS, **step_options("the paper: 20000, with 1024 images")},
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        quantizers, rewrites = start(graph, calibration, bits, run)
        plan = Plan(quantizers, rewrites)
        report = reconstruct(
            graph,
            plan,
            calibration,
            dropping("qdrop", run, calibration.count, "mse"),
            seed=run.seed,
            progress=run.progress,
            checkpoint=run["checkpoint"],
        )
        plan.notes["reconstruction"] = report.info()
        return plan
