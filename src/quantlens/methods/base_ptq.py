"""base-ptq: scales by the cosine similarity of every layer's output, the baseline of PTQ4ViT (Yuan et al., ECCV 2022,
section 3.1 and Table 1).

Symmetric uniform, codes −2ᵇ⁻¹ … 2ᵇ⁻¹ − 1, one scale per tensor; Δ0 = max|x|/(2ᵇ⁻¹ − ½). For every layer, on the float
model's activations (layers do not wait for each other): the weight's scale among Δ0·(α + i(β − α)/n), i < n, that
makes the output most similar to the float layer's, then the input's with that weight; for the products of the
attention the left operand, then the right one. α = 0.5, β = 1.2, n = 100, one round.
"""

from quantlens.methods._scale_search import IMAGE, search_options, search_scales
from quantlens.methods.base import MATMUL_OPERANDS, Calibration, Graph, Method, MethodInfo, Option, Plan, Run, Widths


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
        departures=(IMAGE,),
        readings=(
            "one scale per tensor; the authors' code gives qkv weights three, and operands of the attention one per "
            "head",
            "the cosine is that of the whole output before the bias, on a sample of 512 tokens of a layer, or as many "
            "(image, head) pairs of a product as hold 2^19 elements; theirs the mean of single tokens' cosines",
            "a convolution with groups, or with padding given as a word, has its operands matched separately",
            "Δ0 itself competes with the candidates, so that a step never does harm",
        ),
        aliases=("baseptq", "base"),
        options={
            **search_options(1),
            "weight_granularity": Option(
                "tensor", "weights of linear layers: one scale per tensor (the paper) or channel", ("tensor", "channel")
            ),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        channels = ("linear", "conv") if run["weight_granularity"] == "channel" else ("conv",)
        return search_scales(
            graph, calibration, bits, run, beta=1.2, margin=0.5, unsigned=False, weight_channels=channels
        )
