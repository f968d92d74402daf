"""Bias correction: the mean of a layer's output, which quantization shifts, is put back by the bias.

Two forms, usable with any method:

* layer-local: :func:`expected_error` is E[ŴX̂ − WX] of one layer from its own operands (Liu et al., NeurIPS 2021,
  eq. 13–15; Nagel et al., ICCV 2019, section 4.2). It needs the means of X and X̂ alone, because the layer is linear.
* network: :func:`correct_biases` takes the calibration images through the quantized network, layer by layer, and brings
  each layer's mean output to that of the float network; what earlier layers leave uncorrected is corrected too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from quantlens.calibration import MEMORY, Calibration, CalibrationPass, EdgeView, Replacement
from quantlens.formats import Operator, Quantizer
from quantlens.graph import Edge, Graph
from quantlens.graph.sites import Site
from quantlens.transforms.layers import ensure_bias

LAYERS = ("linear", "conv")


def expected_error(weight: Tensor, quantized_weight: Tensor, inputs: Tensor, quantized_inputs: Tensor) -> Tensor:
    """[out] float64 mean over all rows of ŴX̂ − WX.

    weight, quantized_weight: [out, in]. inputs, quantized_inputs: [..., in], the same rows.
    """
    mean, quantized_mean = (x.reshape(-1, x.shape[-1]).mean(0, dtype=torch.float64) for x in (inputs, quantized_inputs))
    return quantized_weight.double() @ quantized_mean - weight.double() @ mean


def mean_output(site: Site, pieces: Iterable[Tensor], weight: Tensor) -> Tensor:
    """[out] float64 mean output, before the bias, of a linear or conv site that reads ``pieces`` with ``weight``.

    pieces: inputs as the site reads them, the calibration images in parts. A convolution is run once, on the mean
    image.
    """
    total: Tensor | None = None
    count = 0
    for piece in pieces:
        dims = tuple(range(piece.dim() - 1)) if site.kind == "linear" else (0,)
        part = piece.sum(dims, dtype=torch.float64)
        total = part if total is None else total + part
        count += piece.numel() // part.numel()
    if total is None:
        raise ValueError(f"{site.name}: no inputs")
    mean = total / count
    if site.kind == "linear":
        return weight.double() @ mean
    arguments = list(site.node.args[3:])
    output = site.node.target(mean[None], weight.double(), None, *arguments, **site.node.kwargs)  # type: ignore[operator]
    return output.mean((0, *range(2, output.dim())))


def corrected_layers(graph: Graph) -> list[Site]:
    """Linear and conv sites whose bias belongs to them alone, in graph order (the others are not corrected)."""
    layers = graph.sites.of_kind(*LAYERS)
    names = [site.bias for site in layers]
    return [site for site in layers if site.bias is None or names.count(site.bias) == 1]


def subtract_from_biases(graph: Graph, shifts: Mapping[str, Tensor]) -> None:
    """bias ← bias − shift for every site named; a missing bias is made. shifts: site -> [out]."""
    for name, shift in shifts.items():
        bias = ensure_bias(graph, graph.sites[name])
        value = graph.tensor(bias)
        graph.set_tensor(bias, (value.double() - shift.to(value.device, torch.float64)).to(value.dtype))
    graph.invalidate()


def output_means(
    graph: Graph, calibration: Calibration, *, memory: int = MEMORY, progress: Callable[[int, int], None] | None = None
) -> dict[str, Tensor]:
    """[out] float64 mean output over the calibration images (and tokens or positions) of every linear and conv site, as
    ``graph`` is now. To be taken before a method replaces weights."""
    found: dict[str, Tensor] = {}

    def note(edge: Edge, view: EdgeView) -> None:
        found[edge.site] = _mean(view.tensors(), edge.node, graph)

    edges = [site.edges["output"] for site in graph.sites.of_kind(*LAYERS)]
    with torch.no_grad():
        CalibrationPass(graph, calibration, sequential=False, memory=memory).run(edges, note, progress)
    return found


def correct_biases(
    graph: Graph,
    quantizers: Mapping[str, Quantizer],
    calibration: Calibration,
    *,
    means: Mapping[str, Tensor] | None = None,
    operators: Mapping[str, Operator] | None = None,
    memory: int = MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Bring each layer's mean output in the quantized network to its mean in the float network, by the biases.

    One layer after the other, in graph order: a layer is corrected after all before it, on activations as the quantized
    and corrected network makes them. The mean is that before a quantizer on the layer's output.

    quantizers, operators: the plan's. means: :func:`output_means` of the float network; needed if weights of ``graph``
    were replaced since, otherwise they are taken here. Returns site -> [out] float64, what was subtracted from the
    bias. ``graph`` is changed; a missing bias is made. Layers that share a bias with another are left as they are.
    """
    if means is None:
        means = output_means(graph, calibration, memory=memory)
    twin = graph.clone(share=True)
    sites = twin.sites
    for name, operator in (operators or {}).items():
        sites[name].node.target = operator  # the pass calls it; the sites were read before
    layers = {site.name for site in corrected_layers(twin)}
    shifts: dict[str, Tensor] = {}

    def on_edge(edge: Edge, view: EdgeView) -> Replacement | None:
        quantizer = quantizers.get(edge.key)
        if edge.name != "output" or edge.site not in layers:
            return quantizer
        shift = shifts[edge.site] = _mean(view.tensors(), edge.node, twin) - means[edge.site].to(twin.device)
        spread = _along(shift, edge.node, twin)

        def corrected(output: Tensor) -> Tensor:
            output = output - spread.to(output.dtype)
            return output if quantizer is None else quantizer(output)

        return corrected

    wanted = [e for key, e in sites.edges.items() if key in quantizers or (e.name == "output" and e.site in layers)]
    with torch.no_grad():
        CalibrationPass(twin, calibration, sequential=True, memory=memory).run(wanted, on_edge, progress)
    subtract_from_biases(graph, shifts)
    return shifts


def _mean(pieces: Sequence[Tensor], node: fx.Node, graph: Graph) -> Tensor:
    """[out] float64 mean over all dimensions but the channels'."""
    channels = _channels(node, graph)
    total: Tensor | None = None
    count = 0
    for piece in pieces:
        axis = channels % piece.dim()
        part = piece.sum(tuple(d for d in range(piece.dim()) if d != axis), dtype=torch.float64)
        total = part if total is None else total + part
        count += piece.numel() // part.numel()
    assert total is not None
    return total / count


def _along(values: Tensor, node: fx.Node, graph: Graph) -> Tensor:
    """[out] shaped to broadcast over the layer's output."""
    return values if _channels(node, graph) == -1 else values[:, None, None]


def _channels(node: fx.Node, graph: Graph) -> int:
    """The channels' dimension in a layer's output: the last of a linear one, the third from the end of a
    convolution."""
    return -1 if graph.constant(node.args[1]).dim() == 2 else -3  # type: ignore[union-attr]
