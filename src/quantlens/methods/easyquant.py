"""easyquant: EasyQuant, post-training quantization via scale optimization (Wu et al., 2020).

Symmetric uniform; weights per output channel, activations per tensor. For every layer the weight's scale and the
input's are searched in turn, the other one fixed, for the largest cosine similarity of the float and the quantized
output: candidates in [α, β] times the scale that the largest magnitude gives, α = 0.5, β = 2, until nothing changes.
A weight's channel is judged by its own output channel, an input by the whole output. Products of the attention: the
left operand and the right one, in turn.

Where the paper, which is about convolutional networks, differs from this file, or is silent:

1. 100 candidates Δ0·(α + i(β − α)/100), and the current scale; at most 2 rounds. The paper was not at hand when
   this was written: α and β are those commonly cited for it.
2. A step that raises the similarity of every channel but lowers that of the whole output is not taken, so that the
   alternation never loses.
3. Tensors without negative values (softmax outputs) get unsigned codes 0 … 2ᵇ − 1: with signed ones half of the codes
   are never used. ``nonnegative=signed`` is the plain symmetric form.
4. Similarities are measured before the bias, on a sample, all layers on the float model's activations: see
   :mod:`quantlens.methods.base_ptq`.
"""

from __future__ import annotations

from quantlens.calibration import Calibration
from quantlens.graph import Graph
from quantlens.methods._scale_search import SEARCH_OPTIONS, search_scales
from quantlens.methods.base import MATMUL_OPERANDS, Method, MethodInfo, Option, Run, Widths
from quantlens.qmodel import Plan


class EasyQuant(Method):
    info = MethodInfo(
        name="easyquant",
        title="EasyQuant",
        paper="EasyQuant: Post-training Quantization via Scale Optimization",
        venue="arXiv",
        year=2020,
        url="https://arxiv.org/abs/2006.16669",
        quantizes=MATMUL_OPERANDS,
        summary="alternating search of weight (per channel) and activation scales by cosine similarity of the output",
        departures="2 rounds of 100 candidates; unsigned codes for tensors without negative values; a sample of tokens",
        aliases=("easy-quant",),
        options={
            **SEARCH_OPTIONS,
            "beta": Option(2.0, "end of the candidates, as alpha"),
            "rounds": Option(2, "most times that both scales of a layer are searched"),
            "weight_granularity": Option(
                "channel", "weights: one scale per output channel (the paper) or tensor", ("channel", "tensor")
            ),
            "nonnegative": Option(
                "unsigned", "codes of tensors without negative values: unsigned or signed", ("unsigned", "signed")
            ),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        channels = {"linear", "conv"} if run["weight_granularity"] == "channel" else set()
        return search_scales(graph, calibration, bits, run, margin=1.0, weight_channels=frozenset(channels))
