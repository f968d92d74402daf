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
"""

from quantlens.methods._reconstruction import (
    DEPARTURES,
    HOURS,
    READINGS,
    drop_and_reconstruct,
    started,
    step_options,
)
from quantlens.methods.base import MATMUL_OPERANDS, Calibration, Departure, Graph, Method, MethodInfo, Plan, Run, Widths

WHERE = "as in the re-implementations of APHQ-ViT and FIMA-Q; the paper is about convolutions"


class QDrop(Method):
    info = MethodInfo(
        name="qdrop",
        title="QDrop",
        paper="QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization",
        venue="ICLR",
        year=2022,
        url="https://arxiv.org/abs/2203.05740",
        quantizes=MATMUL_OPERANDS,
        version=3,
        summary="block reconstruction with activation quantization dropped at random; learned rounding and scales",
        departures=(
            *DEPARTURES,
            Departure(
                "reparameterized", True, False, f"LayerNorm outputs are rewritten as by RepQ-ViT at first, {WHERE}"
            ),
            Departure("by_head", True, False, f"the attention's operands have one scale per head, {WHERE}"),
            Departure("head_bits", None, 8, "the last layer has the bits asked for, as the others; the paper's has 8"),
        ),
        readings=(*READINGS, "ranges at the start have the least squared error; the authors' exponent is 2.4"),
        because=HOURS,
        aliases=("q-drop",),
        options=step_options(20_000, 32),
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        settings = {name: run[name] for name in ("reparameterized", "by_head")}
        plan = started(graph, calibration, bits, run, **settings)
        drop_and_reconstruct(graph, plan, calibration, run)
        return plan
