"""What methods that search scales by the similarity of outputs share: one product of the graph after the other, on
samples of the float model's tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from quantlens.calibration import Calibration
from quantlens.calibration.products import Product, find_products, visit_products
from quantlens.calibration.ranges.similarity import Operand, alternate, candidate_factors, search
from quantlens.calibration.sampling import ProductSampler
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer, Uniform
from quantlens.graph import Graph
from quantlens.methods.base import Departure, Option, Run, Widths, matmul_operand_edges
from quantlens.qmodel import Plan
from quantlens.qmodel.bits import FLOAT

ALPHA = 0.5
"""Smallest candidate, as a multiple of the scale that the largest magnitude gives."""

IMAGE = Departure("patch_bits", 8, 32, "the image is quantized; the authors leave it in float")

UNSIGNED = Departure(
    "unsigned", True, False, "tensors without negative values (softmax outputs) get unsigned codes 0 … 2^b − 1"
)


def search_options(rounds: int) -> dict[str, Option]:
    """Options of every search."""
    return {
        "candidates": Option(100, "candidates per scale"),
        "rounds": Option(rounds, "most times that both scales of a product are searched"),
    }


def factors_of(run: Run, beta: float, alpha: float = ALPHA) -> tuple[list[float], int]:
    """What the scale that the largest magnitude gives is multiplied by, and the number of rounds. Raises QuantlensError
    for numbers that make no search."""
    candidates, rounds = int(run["candidates"]), int(run["rounds"])
    if candidates < 1 or rounds < 1:
        raise QuantlensError(f"candidates={candidates}, rounds={rounds}: give at least one of each (100, 3)")
    return candidate_factors(alpha, beta, candidates), rounds


def search_scales(
    graph: Graph,
    calibration: Calibration,
    bits: Widths,
    run: Run,
    *,
    beta: float,
    margin: float,
    unsigned: bool,
    weight_channels: Collection[str],
) -> Plan:
    """Scales of all matmul operands by alternating search, one site after the other, on the float model's tensors.

    beta: end of the candidates, as :data:`ALPHA`. margin, unsigned: of :func:`operand`. weight_channels: site kinds
    whose weights have a scale per output channel.
    """
    factors, rounds = factors_of(run, beta)
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
                channels = together and edge.is_weight and product.site.kind in weight_channels
                sides.append(operand(value, parts, bits.of(graph, edge), margin, unsigned, channels=channels))
            else:
                sides.append(Operand(value))
        if together:
            sides = list(alternate(sides[0], sides[1], factors, rounds)[:2])
        else:
            sides = [search(s, Operand(torch.eye(s.values.shape[-1]).to(s.values)), factors) for s in sides]
        for edge, side in zip(product.quantized, sides, strict=True):
            if side.scale is not None:
                quantizers[edge.key] = quantizer_of(side, bits.of(graph, edge))

    settle_products(graph, calibration, bits, run, settle)
    return Plan({e.key: quantizers[e.key] for e in matmul_operand_edges(graph) if e.key in quantizers})


def settle_products(
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

    visit_products(graph, calibration, products, on_product, seed=run.seed, progress=run.progress)


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
    values: Tensor, parts: Sequence[Tensor], bits: int, margin: float, unsigned: bool, *, channels: bool = False
) -> Operand:
    """An operand at its starting scale max|x|/(2ᵇ⁻¹ − margin), which the largest magnitude of all its values gives.
    unsigned: codes of tensors without negative values."""
    unsigned = unsigned and all(bool((part >= 0).all()) for part in parts)
    if channels:
        largest = values.abs().amax(dim=1)
    else:
        largest = torch.stack([part.abs().max() for part in parts]).max()
    low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    steps = high if unsigned else max(2 ** (bits - 1) - margin, 0.5)
    start = largest.double() / steps
    # nothing to represent: any scale does
    start = torch.where(start > torch.finfo(torch.float32).tiny * 1e6, start, torch.ones_like(start)).float()
    return Operand.of(values, start, low, high)
