"""What methods share that are compositions: a range rule for activations and a fit for weights, in one pass over the
calibration images, layer after layer, from the second moments of its inputs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from quantlens.calibration import Calibration, CalibrationPass, EdgeView, Replacement, patches
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer
from quantlens.graph import Edge, Graph, Site
from quantlens.methods.base import Plan, Run, Widths, quantized_edges
from quantlens.reconstruction.bias import corrected_layers, subtract_from_biases
from quantlens.reconstruction.closed_form import ROWS, Moments

PATCHES = 256
"""Patches that a convolution reads of an image, roughly: how many images are quantized together follows from it."""


@dataclass(frozen=True)
class Layer:
    """A layer whose weight is to be fitted.

    stored: the weight as the graph has it. pieces: what the layer reads, before its own input's quantizer (``own``).
    width: bits of the weight. free: whether its bias is its own and may change.
    """

    site: Site
    stored: Tensor
    pieces: Sequence[Tensor]
    own: Quantizer | None
    width: int
    free: bool

    @property
    def weight(self) -> Tensor:
        """[out, in]."""
        return self.stored.flatten(1)

    def moments(self, *, network: bool) -> Moments | None:
        """Moments of the inputs x̄ after the layer's own quantizer and x before it (``network``: x = x̄, what the
        quantized network makes); a convolution's are those of its patches, ``None`` for one that is no product (groups,
        padding given as a word). Raises QuantlensError naming the layer where values are not finite."""
        if patches(self.site, self.stored, self.pieces[0][:1]) is None:
            return None
        try:
            return Moments.of(self._rows(network), self.weight)
        except ValueError as error:
            raise QuantlensError(
                f"{self.site.name}.input: {error}; check the weights and the calibration images"
            ) from error

    def _rows(self, network: bool) -> Iterator[tuple[Tensor, Tensor]]:
        first, own = self.pieces[0], self.own
        tokens = first[0].numel() // first.shape[-1] if self.site.kind == "linear" else PATCHES
        for piece in (part for whole in self.pieces for part in whole.split(max(1, ROWS // max(tokens, 1)))):
            quantized = patches(self.site, self.stored, piece if own is None else own(piece))
            yield quantized, quantized if network or own is None else patches(self.site, self.stored, piece)


@dataclass(frozen=True)
class Fitted:
    """A layer's weight: its quantizer; its values [out, in] on that grid (``None``: rounded to nearest); what is to be
    subtracted from the bias [out]."""

    quantizer: Quantizer
    value: Tensor | None = None
    shift: Tensor | None = None


RangeRule = Callable[[Site, Edge, EdgeView, int], Quantizer]
"""(site, edge, values, width) -> the quantizer of an activation."""


def fit_layers(
    graph: Graph,
    calibration: Calibration,
    bits: Widths,
    plan: Plan,
    fit: Callable[[Layer], Fitted],
    run: Run,
    *,
    sequential: bool,
    ranges: RangeRule | None = None,
) -> int:
    """Quantizers of activations by ``ranges`` (``None``: ``plan`` has them), and fitted weights and biases: into the
    plan and the graph. Returns how many weights were fitted. Layers that share one get that of the first.

    sequential: each layer reads what the quantized and fitted part of the network before it makes; else what the float
    network makes.
    """
    free = {site.name for site in corrected_layers(graph)}
    found: dict[str, tuple[str, Fitted]] = {}

    def on_edge(edge: Edge, view: EdgeView) -> Replacement:
        site, width = graph.sites[edge.site], bits.of(graph, edge)
        if not edge.is_weight:
            if ranges is not None:
                plan.quantizers[edge.key] = ranges(site, edge, view, width)
            return plan.quantizers[edge.key]
        name = str(site.weight)
        read, own = view.tensors(site.edges["input"]), plan.quantizers.get(f"{site.name}.input")
        layer = Layer(site, graph.tensor(name), read, own, width, site.name in free)
        first, fitted = found[name] if name in found else (site.name, fit(layer))
        plan.quantizers[edge.key] = fitted.quantizer
        if fitted.value is None:
            return fitted.quantizer
        found[name] = first, fitted
        value = fitted.value.reshape(graph.tensor(name).shape)
        return lambda _: value

    edges = quantized_edges(graph, bits)
    CalibrationPass(graph, calibration, sequential=sequential, seed=run.seed).run(edges, on_edge, run.progress)
    for name, (_, fitted) in found.items():
        graph.set_tensor(name, fitted.value.reshape(graph.tensor(name).shape))  # type: ignore[union-attr]
    subtract_from_biases(graph, {site: one.shift for site, one in found.values() if one.shift is not None})
    return len(found)
