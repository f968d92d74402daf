"""minmax: the whole range that was seen, the baseline of every comparison.

Weights per output channel, activations per tensor, both asymmetric uniform, ranges = [min, max] over the calibration
images as the float model makes them (Jacob et al., CVPR 2018, section 3, with min-max in place of a moving average
because the number of calibration images is small and all of them are seen at once). Floating-point formats
(``bits="MXFP4"``) have the scales that their standards give.
"""

from collections.abc import Callable

from torch import Tensor

from quantlens.calibration import Calibration, CalibrationPass, EdgeView, Observation, affine, minmax, symmetric
from quantlens.formats import Quantizer
from quantlens.methods._floating import BLOCK_SCALE, SEARCH, floating_activation, floating_weight
from quantlens.methods.base import MATMUL_OPERANDS, Edge, Graph, Method, MethodInfo, Plan, Run, Widths, quantized_edges


class MinMax(Method):
    info = MethodInfo(
        name="minmax",
        title="Min-max",
        paper="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        venue="CVPR",
        year=2018,
        url="https://arxiv.org/abs/1712.05877",
        quantizes=MATMUL_OPERANDS,
        summary="whole range seen; weights per output channel, activations per tensor, asymmetric uniform",
        readings=("the paper trains with moving averages; here the range is that of all calibration images",),
        aliases=("min-max",),
        options={"block_scale": BLOCK_SCALE},
        floating=True,
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        return uniform_everywhere(graph, calibration, bits, run, minmax, tail=0.0)


def uniform_everywhere(
    graph: Graph,
    calibration: Calibration,
    bits: Widths,
    run: Run,
    choose: Callable[[Observation], tuple[Tensor, Tensor]],
    *,
    tail: float,
    symmetric_tensors: bool = False,
) -> Plan:
    """Uniform quantizers on all matmul operands, ranges by ``choose(observation) -> (low, high)`` of the float model's
    activations: asymmetric, weights per output channel; or symmetric with one scale per tensor. ``choose`` reads no
    samples, so that all widths on the same images share one pass. Where ``bits`` says so, floating-point formats, with
    the option ``block_scale``."""
    make = symmetric if symmetric_tensors else affine

    def on_edge(edge: Edge, view: EdgeView) -> Quantizer:
        site, name = graph.sites[edge.site], bits.format_of(graph, edge)
        if name:
            search = run["block_scale"] == SEARCH
            if not edge.is_weight:
                return floating_activation(name, site, edge, view, search=search)
            return floating_weight(name, site, edge, view.tensors()[0], search=search)
        axis, granularity = (0, "channel") if edge.is_weight and not symmetric_tensors else (None, "tensor")
        low, high = choose(view(axis=axis, tail=tail, sample=False))
        return make(low, high, bits.of(graph, edge), granularity=granularity, axis=axis)

    shown = CalibrationPass(graph, calibration, sequential=False, seed=run.seed, seen=run.seen)
    made = shown.run(quantized_edges(graph, bits), on_edge, run.progress)
    return Plan({edge.key: quantizer for edge, quantizer in made.items()})
