"""easyquant: EasyQuant, post-training quantization via scale optimization (Wu et al., 2020).

Symmetric uniform; weights per output channel, activations per tensor. For every layer the weight's scale and the
input's are searched in turn, the other one fixed, for the largest cosine similarity of the float and the quantized
output: candidates in [α, β] times the scale that the largest magnitude gives, α = 0.5, β = 2, until nothing changes.
A weight's channel is judged by its own output channel, an input by the whole output. Products of the attention: the
left operand and the right one, in turn.
"""

from quantlens.methods._scale_search import UNSIGNED, search_options, search_scales
from quantlens.methods.base import MATMUL_OPERANDS, Calibration, Graph, Method, MethodInfo, Option, Plan, Run, Widths


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
        departures=(UNSIGNED,),
        readings=(
            "100 candidates, and the current scale; at most 2 rounds. The paper was not at hand",
            "a step that lowers the similarity of the whole output is not taken",
            "similarities are measured before the bias, on a sample, all layers on the float model's activations",
        ),
        aliases=("easy-quant",),
        options={
            **search_options(2),
            "weight_granularity": Option(
                "channel", "weights: one scale per output channel (the paper) or tensor", ("channel", "tensor")
            ),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        channels = ("linear", "conv") if run["weight_granularity"] == "channel" else ()
        return search_scales(
            graph, calibration, bits, run, beta=2.0, margin=1.0, unsigned=run["unsigned"], weight_channels=channels
        )
