"""What methods that search scales by the similarity of outputs share: one product of the graph after the other, on
samples of the float model's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlens.calibration import Calibration
from quantlens.calibration.products import Product, find_products
from quantlens.calibration.products import visit_products as products_pass
from quantlens.calibration.ranges.similarity import Operand, alternate, candidate_factors, search
from quantlens.calibration.sampling import ProductSampler
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer, Uniform
from quantlens.graph import Graph
from quantlens.methods.base import (
    Option,
    Run,
    Widths,
    matmul_operand_edges,
)
from quantlens.qmodel import Plan
from quantlens.qmodel.bits import FLOAT


@dataclass(frozen=True)
class SearchSettings:
    """What differs between methods that search scales by similarity.

    margin: Δ0 = max|x|/(2ᵇ⁻¹ − margin). weight_channels: site kinds whose weights have a scale per output channel.
    """

    alpha: float
    beta: float
    candidates: int
    rounds: int
    margin: float
    weight_channels: frozenset[str]
    unsigned: bool

    def check(self) -> None:
        """Raises QuantlensError for numbers that make no search."""
        if not 0 < self.alpha < self.beta or self.candidates < 1 or self.rounds < 1:
            raise QuantlensError(
                f"alpha={self.alpha}, beta={self.beta}, candidates={self.candidates}, rounds={self.rounds}:"
                " 0 < alpha < beta, and at least one candidate and round (for example 0.5, 1.2, 100, 1)"
            )


SEARCH_OPTIONS = {
    "candidates": Option(100, "candidates per scale"),
    "alpha": Option(0.5, "smallest candidate, as a multiple of the scale that the largest magnitude gives"),
}


def search_scales(
    graph: Graph,
    calibration: Calibration,
    bits: Widths,
    run: Run,
    *,
    margin: float,
    weight_channels: frozenset[str],
) -> Plan:
    """Scales of all matmul operands by alternating search, one site after the other, on the float model's tensors."""
    settings = SearchSettings(
        float(run["alpha"]),
        float(run["beta"]),
        int(run["candidates"]),
        int(run["rounds"]),
        margin,
        weight_channels,
        run["nonnegative"] == "unsigned",
    )
    settings.check()
    factors = candidate_factors(settings.alpha, settings.beta, settings.candidates)
    quantizers: dict[str, Quantizer] = {}
    sampler = ProductSampler(torch.Generator().manual_seed(run.seed))

    def settle(product: Product, tensors: list[Sequence[Tensor]], wanted: set[str]) -> None:
        values = sampler.joined(product, tensors)
        together = values is not None
        if values is None:
            values = sampler.each_alone(tensors)
        sides = []
        for edge, parts, value in zip(product.quantized, tensors, values, strict=True):
            if edge.key in wanted:
                channels = together and edge.is_weight and product.site.kind in settings.weight_channels
                sides.append(operand(value, parts, bits.of(graph, edge), settings, channels=channels))
            else:
                sides.append(Operand(value))
        if together:
            sides = list(alternate(sides[0], sides[1], factors, settings.rounds)[:2])
        else:
            sides = [search(s, Operand(torch.eye(s.values.shape[-1]).to(s.values)), factors) for s in sides]
        for edge, side in zip(product.quantized, sides, strict=True):
            if side.scale is not None:
                quantizers[edge.key] = quantizer_of(side, bits.of(graph, edge))

    visit_products(graph, calibration, bits, run, settle)
    return Plan({e.key: quantizers[e.key] for e in matmul_operand_edges(graph) if e.key in quantizers})


def visit_products(
    graph: Graph,
    calibration: Calibration,
    bits: Widths,
    run: Run,
    settle: Callable[[Product, list[Sequence[Tensor]], set[str]], None],
) -> None:
    """Show ``settle`` every product that has an operand to be quantized: the product, the float values that each of its
    operands has (one tensor per chunk of images, one for a weight), and the keys of all edges to be quantized.

    Raises QuantlensError naming the edge where values are not finite.
    """
    wanted = {e.key for e in matmul_operand_edges(graph) if bits.of(graph, e) != FLOAT}
    products = [p for p in find_products(graph) if any(e.key in wanted for e in p.quantized)]

    def on_product(product: Product, tensors: list[Sequence[Tensor]]) -> None:
        settle(product, tensors, wanted)

    products_pass(graph, calibration, products, on_product, seed=run.seed, progress=run.progress)


def quantizer_of(side: Operand, bits: int) -> Uniform:
    """The quantizer with an operand's current scale."""
    assert side.scale is not None
    return Uniform(
        side.scale,
        torch.zeros_like(side.scale),
        bits,
        signed=side.low < 0,
        granularity="channel" if side.per_row else "tensor",
        axis=0 if side.per_row else None,
    )


def operand(
    values: Tensor, parts: Sequence[Tensor], bits: int, settings: SearchSettings, *, channels: bool = False
) -> Operand:
    """An operand at its starting scale, which the largest magnitude of all its values gives."""
    unsigned = settings.unsigned and all(bool((part >= 0).all()) for part in parts)
    if channels:
        largest = values.abs().amax(dim=1)
    else:
        largest = torch.stack([part.abs().max() for part in parts]).max()
    low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    steps = high if unsigned else max(2 ** (bits - 1) - settings.margin, 0.5)
    start = largest.double() / steps
    # nothing to represent: any scale does
    start = torch.where(start > torch.finfo(torch.float32).tiny * 1e6, start, torch.ones_like(start)).float()
    return Operand.of(values, start, low, high)
