"""What methods share that fit the weights of a calibrated network in closed form: one layer after the other, from the
second moments of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from quantlens.calibration import Calibration, CalibrationPass, EdgeView, Transform
from quantlens.calibration.products import patches
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer
from quantlens.graph import Edge, Graph
from quantlens.graph.sites import Site
from quantlens.methods.base import Run, matmul_operand_edges
from quantlens.qmodel import Plan
from quantlens.reconstruction.bias import LAYERS, corrected_layers, subtract_from_biases
from quantlens.reconstruction.closed_form import ROWS, Moments

PATCHES = 256
"""Patches that a convolution reads of an image, roughly: how many images are quantized together follows from it."""


@dataclass(frozen=True)
class Fitted:
    """A layer's fitted weight: its quantizer, its values [out, in] on the quantizer's grid, and [out] what is to be
    subtracted from the bias (``None``: nothing)."""

    quantizer: Quantizer
    value: Tensor
    shift: Tensor | None = None


Fit = Callable[[Tensor, Moments, int, bool], Fitted]
"""(weight [out, in], moments, width, whether the bias may change) -> fitted weight."""


def fit_layers(graph: Graph, calibration: Calibration, plan: Plan, fit: Fit, run: Run, *, network: bool) -> int:
    """Replace the weights of all layers whose weight ``plan`` quantizes by fitted ones, in ``graph`` and in ``plan``;
    returns how many.

    network: moments of inputs as the quantized and fitted network makes them (x̄ = x). Otherwise x is the float
    network's input and x̄ = x through the layer's own quantizer. A convolution is fitted on its patches; one that is no
    product (groups, padding given as a word) is left as it is. Layers that share a weight get that of the first.
    Raises QuantlensError naming the layer where values are not finite.
    """
    free = {site.name for site in corrected_layers(graph)}
    found: dict[str, Fitted] = {}
    shifts: dict[str, Tensor] = {}

    def on_edge(edge: Edge, view: EdgeView) -> Transform | None:
        if not edge.is_weight:
            return plan.quantizers.get(edge.key)
        site, name = graph.sites[edge.site], str(edge.value.target)
        weight = graph.tensor(name)
        if name not in found:
            own = plan.quantizers.get(f"{site.name}.input")
            moments = layer_moments(site, weight, view.tensors(site.edges["input"]), own, network)
            if moments is None:
                return plan.quantizers[edge.key]
            fitted = fit(weight.flatten(1), moments, plan.quantizers[edge.key].bits, site.name in free)
            found[name] = fitted
            if fitted.shift is not None:
                shifts[site.name] = fitted.shift
        plan.quantizers[edge.key] = found[name].quantizer
        return lambda weight: found[name].value.reshape(weight.shape)

    layers = [s.name for s in graph.sites.of_kind(*LAYERS) if f"{s.name}.weight" in plan.quantizers]
    # the inputs too: the pass stops for activations alone
    wanted = {f"{name}.{edge}" for name in layers for edge in ("input", "weight")} | set(plan.quantizers)
    edges = [e for e in matmul_operand_edges(graph) if e.key in wanted]
    CalibrationPass(graph, calibration, sequential=network, seed=run.seed).run(edges, on_edge, run.progress)
    for name, fitted in found.items():
        graph.set_tensor(name, fitted.value.reshape(graph.tensor(name).shape))
    subtract_from_biases(graph, shifts)
    return len(found)


def layer_moments(
    site: Site, weight: Tensor, pieces: Sequence[Tensor], own: Quantizer | None, network: bool
) -> Moments | None:
    """Moments of a layer's inputs after and (unless ``network``) before its own quantizer, for its weight; ``None`` for
    a convolution that is no product. Raises QuantlensError naming the layer where values are not finite."""
    if patches(site, weight, pieces[0][:1]) is None:
        return None

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        tokens = pieces[0][0].numel() // pieces[0].shape[-1] if site.kind == "linear" else PATCHES
        for piece in (part for whole in pieces for part in whole.split(max(1, ROWS // max(tokens, 1)))):
            quantized = patches(site, weight, piece if own is None else own(piece))
            plain = quantized if network or own is None else patches(site, weight, piece)
            assert quantized is not None
            assert plain is not None
            yield quantized, plain

    try:
        return Moments.of(rows(), weight.flatten(1))
    except ValueError as error:
        raise QuantlensError(f"{site.name}.input: {error}; check the weights and the calibration images") from error
