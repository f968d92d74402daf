"""base-ptq: scales by the cosine similarity of every layer's output, the baseline of PTQ4ViT (Yuan et al., ECCV 2022,
section 3.1 and Table 1).

Symmetric uniform, codes −2ᵇ⁻¹ … 2ᵇ⁻¹ − 1, one scale per tensor; Δ0 = max|x|/(2ᵇ⁻¹ − ½). For every layer, on the float
model's activations (layers do not wait for each other): the weight's scale among Δ0·(α + i(β − α)/n), i < n, that
makes the output most similar to the float layer's, then the input's with that weight; for the products of the
attention the left operand, then the right one. α = 0.5, β = 1.2, n = 100, one round.

Where the authors' code differs from this file, or is silent:

1. They give qkv weights three scales and the operands of the attention one per head; here one per tensor. The patch
   embedding's weight has one per output channel, as theirs; its input, which they leave in float, follows the option
   ``patch_bits``.
2. They average the cosines of single output vectors over all tokens; here the cosine of the whole output is taken,
   which is exact from Gram matrices, over a random sample: 512 tokens of a layer's input, and as many (image, head)
   pairs of a product as hold 2¹⁹ elements. The largest magnitude is that of all images. The output is that
   before the bias, which no scale changes.
3. Δ0 itself (more exactly the current scale) competes with the candidates, so that a step never does harm.
4. Softmax outputs are signed too, as theirs: half of the codes are never used. ``nonnegative=unsigned`` gives tensors
   without negative values the codes 0 … 2ᵇ − 1.
5. A convolution with groups, or with padding given as a word, has no such product: its operands are matched
   separately (cosine of the tensor and the quantized tensor).
"""

from __future__ import annotations

from quantlens.calibration import Calibration
from quantlens.graph import Graph
from quantlens.methods._scale_search import SEARCH_OPTIONS, search_scales
from quantlens.methods.base import MATMUL_OPERANDS, Method, MethodInfo, Option, Run, Widths
from quantlens.qmodel import Plan


class BasePTQ(Method):
    info = MethodInfo(
        name="base-ptq",
        title="BasePTQ",
        paper="PTQ4ViT: Post-Training Quantization for Vision Transformers with Twin Uniform Quantization",
        venue="ECCV",
        year=2022,
        url="https://arxiv.org/abs/2111.12293",
        quantizes=MATMUL_OPERANDS,
        summary="symmetric uniform per tensor; scales by the cosine similarity of every layer's output, one round",
        departures="one scale for qkv weights and for all heads; cosine of a sample of the whole output, not per token",
        aliases=("baseptq", "base"),
        options={
            **SEARCH_OPTIONS,
            "beta": Option(1.2, "end of the candidates, as alpha"),
            "rounds": Option(1, "times that both scales of a layer are searched"),
            "weight_granularity": Option(
                "tensor", "weights of linear layers: one scale per tensor (the paper) or channel", ("tensor", "channel")
            ),
            "nonnegative": Option(
                "signed", "codes of softmax outputs: signed (the paper) or unsigned", ("signed", "unsigned")
            ),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        channels = {"linear", "conv"} if run["weight_granularity"] == "channel" else {"conv"}
        return search_scales(graph, calibration, bits, run, margin=0.5, weight_channels=frozenset(channels))
