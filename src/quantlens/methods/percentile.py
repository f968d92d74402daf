"""percentile: the range between two extreme quantiles, so that a few outliers do not stretch it.

Weights per output channel and activations per tensor, asymmetric uniform, range = [quantile(1 − p), quantile(p)] (Li
et al., CVPR 2019, which clips activations at a percentile; used as the baseline "Percentile" by the PTQ papers for
transformers).

Where the papers are silent: p. 0.9999 is used for activations as for weights; with the 200 to 3000 weights of an
output channel that is all but the whole range, which is what the comparisons in the literature amount to. Liu et al.
(NeurIPS 2021) compare with a percentile in their own format, symmetric with one scale per tensor, weights too:
``format=symmetric``.
"""

from functools import partial

from quantlens.calibration.ranges import percentile
from quantlens.methods.base import MATMUL_OPERANDS, Calibration, Graph, Method, MethodInfo, Option, Plan, Run, Widths
from quantlens.methods.minmax import uniform_everywhere


class Percentile(Method):
    info = MethodInfo(
        name="percentile",
        title="Percentile",
        paper="Fully Quantized Network for Object Detection",
        venue="CVPR",
        year=2019,
        url="https://openaccess.thecvf.com/content_CVPR_2019/html/Li_Fully_Quantized_Network_for_Object_Detection_CVPR_2019_paper.html",
        quantizes=MATMUL_OPERANDS,
        summary="range between the quantiles 1 − p and p; weights per output channel, activations per tensor",
        readings=("p is not stated for transformers; 0.9999 here, for weights and activations",),
        options={
            "p": Option(0.9999, "order of the upper quantile, above 0.5 and at most 1", above=0.5, most=1),
            "format": Option(
                "asymmetric",
                "asymmetric, weights per output channel; or symmetric, one scale per tensor (the baseline of vt-ptq's "
                "paper)",
                ("asymmetric", "symmetric"),
            ),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        choose, plain = partial(percentile, p=run["p"]), run["format"] == "symmetric"
        return uniform_everywhere(graph, calibration, bits, run, choose, tail=1.0 - run["p"], symmetric_tensors=plain)
