"""Bias correction: the mean of a layer's output, which quantization shifts, is put back by the bias.

Two forms, usable with any method:

* layer-local: :func:`mean_output` of Ŵ and X̂ less that of W and X is E[ŴX̂ − WX] of one layer (Liu et al., NeurIPS
  2021, eq. 13–15; Nagel et al., ICCV 2019, section 4.2). It needs the means of X and X̂ alone: the layer is linear.
* network: :func:`correct_biases` takes the calibration images through the quantized network, layer by layer, and brings
  each layer's mean output to that of the float network; what earlier layers leave uncorrected is corrected too.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from quantlens.calibration import Calibration, CalibrationPass, EdgeView, Replacement
from quantlens.formats import Operator, Quantizer
from quantlens.graph import Edge, Graph, Site
from quantlens.transforms.layers import ensure_bias

CHANNELS = {"linear": -1, "conv": -3}
"""The channels' dimension in the output of a layer."""

LAYERS = tuple(CHANNELS)


def mean_output(site: Site, pieces: Iterable[Tensor], weight: Tensor) -> Tensor:
    """[out] float64 mean output, before the bias, of a linear or conv site that reads ``pieces`` with ``weight``.

    pieces: inputs as the site reads them, the calibration images in parts. A convolution is run once, on the mean
    image.
    """
    if site.kind == "linear":
        return weight.double() @ _mean(pieces, -1)
    arguments = list(site.node.args[3:])
    output = site.node.target(_mean(pieces)[None], weight.double(), None, *arguments, **site.node.kwargs)  # type: ignore[operator]
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


def output_means(graph: Graph, calibration: Calibration) -> dict[str, Tensor]:
    """[out] float64 mean output over the calibration images (and tokens or positions) of every linear and conv site, as
    ``graph`` is now. To be taken before a method replaces weights."""
    edges = {site.edges["output"]: CHANNELS[site.kind] for site in graph.sites.of_kind(*LAYERS)}
    with torch.no_grad():
        shown = CalibrationPass(graph, calibration, sequential=False)
        found = shown.run(list(edges), lambda edge, view: _mean(view.tensors(), edges[edge]))
    return {edge.site: mean for edge, mean in found.items()}


def correct_biases(
    graph: Graph,
    quantizers: Mapping[str, Quantizer],
    calibration: Calibration,
    *,
    means: Mapping[str, Tensor] | None = None,
    operators: Mapping[str, Operator] | None = None,
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
        means = output_means(graph, calibration)
    twin = graph.clone(share=True)
    sites = twin.sites
    for name, operator in (operators or {}).items():
        sites[name].node.target = operator  # the pass calls it; the sites were read before
    layers = {site.name: CHANNELS[site.kind] for site in corrected_layers(twin)}
    shifts: dict[str, Tensor] = {}

    def on_edge(edge: Edge, view: EdgeView) -> Replacement | None:
        quantizer = quantizers.get(edge.key)
        if edge.name != "output" or edge.site not in layers:
            return quantizer
        axis = layers[edge.site]
        shift = shifts[edge.site] = _mean(view.tensors(), axis) - means[edge.site].to(twin.device)
        spread = shift.reshape(-1, *[1] * (-1 - axis))

        def corrected(output: Tensor) -> Tensor:
            output = output - spread.to(output.dtype)
            return output if quantizer is None else quantizer(output)

        return corrected

    wanted = [e for key, e in sites.edges.items() if key in quantizers or (e.name == "output" and e.site in layers)]
    with torch.no_grad():
        CalibrationPass(twin, calibration, sequential=True).run(wanted, on_edge, progress)
    subtract_from_biases(graph, shifts)
    return shifts


def _mean(pieces: Iterable[Tensor], axis: int | None = None) -> Tensor:
    """float64 mean of all pieces over all dimensions but ``axis`` (None: over the images, the first one, alone)."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for piece in pieces:
        dims = [0] if axis is None else [d for d in range(piece.dim()) if d != axis % piece.dim()]
        part = piece.sum(dims, dtype=torch.float64)
        total = total.to(part.device) + part
        count += piece.numel() // part.numel()
    return total / count
