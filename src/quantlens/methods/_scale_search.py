"""What methods share that search scales product by product: the pass over the products, starting scales, candidates."""

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from quantlens.calibration.ranges.guided import HEADS
from quantlens.calibration.ranges.similarity import Operand, alternate, candidate_factors, search
from quantlens.calibration.sampling import Product, ProductSampler, find_products, visit_products
from quantlens.formats import Quantizer, Uniform
from quantlens.methods.base import FLOAT, Calibration, Departure, Graph, Option, Plan, Run, Widths

ALPHA = 0.5
"""Smallest candidate, as a multiple of the scale that the largest magnitude gives."""

IMAGE = Departure("patch_bits", 8, 32, "the image is quantized; the authors leave it in float")

UNSIGNED = Departure(
    "unsigned", True, False, "tensors without negative values (softmax outputs) get unsigned codes 0 … 2^b − 1"
)


def search_options(rounds: int) -> dict[str, Option]:
    """Options of every search."""
    return {
        "candidates": Option(100, "candidates per scale", least=1),
        "rounds": Option(rounds, "most times that both scales of a product are searched", least=1),
    }


def factors_of(run: Run, beta: float, alpha: float = ALPHA) -> list[float]:
    """What the scale that the largest magnitude gives is multiplied by."""
    return candidate_factors(alpha, beta, run["candidates"])


def quantized_products(graph: Graph, bits: Widths) -> list[Product]:
    """The products that have an operand to be quantized."""
    return [p for p in find_products(graph) if any(bits.of(graph, e) != FLOAT for e in p.quantized)]


Settle = Callable[[Product, list[Sequence[Tensor]]], Iterable[Quantizer | None]]
"""(product, the float values that each of its operands has: one tensor per chunk of images, one for a weight) -> the
quantizers of its operands, None for one that stays in float."""


def settle_products(graph: Graph, calibration: Calibration, bits: Widths, run: Run, settle: Settle) -> Plan:
    """A plan with the quantizers that ``settle`` chooses, one product after the other, none waiting for another. Raises
    QuantlensError naming the edge where values are not finite."""
    plan = Plan()

    def on_product(product: Product, tensors: list[Sequence[Tensor]]) -> None:
        for edge, quantizer in zip(product.quantized, settle(product, tensors), strict=True):
            if quantizer is not None:
                plan.quantizers[edge.key] = quantizer

    products = quantized_products(graph, bits)
    visit_products(graph, calibration, products, on_product, seed=run.seed, progress=run.progress)
    return plan


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
    """Scales of all matmul operands by alternating search, on the float model's tensors.

    beta: end of the candidates, as :data:`ALPHA`. margin, unsigned: of :func:`operand`. weight_channels: site kinds
    whose weights have a scale per output channel.
    """
    factors = factors_of(run, beta)
    sampler = ProductSampler(torch.Generator().manual_seed(run.seed))

    def settle(product: Product, tensors: list[Sequence[Tensor]]) -> list[Quantizer | None]:
        joined = sampler.joined(product, tensors)
        values = sampler.each_alone(tensors) if joined is None else joined
        widths = [bits.of(graph, edge) for edge in product.quantized]
        by_channel = joined is not None and product.site.kind in weight_channels
        sides = [
            operand(value, parts, width, margin, unsigned, channels=by_channel and edge.is_weight)
            for edge, parts, value, width in zip(product.quantized, tensors, values, widths, strict=True)
        ]
        if joined is None:
            sides = [search(s, Operand(torch.eye(s.values.shape[-1]).to(s.values)), factors) for s in sides]
        else:
            sides = list(alternate(sides[0], sides[1], factors, run["rounds"])[:2])
        return [quantizer_of(side, width) for side, width in zip(sides, widths, strict=True)]

    return settle_products(graph, calibration, bits, run, settle)


def operand(
    values: Tensor, parts: Sequence[Tensor], bits: int, margin: float, unsigned: bool, *, channels: bool = False
) -> Operand:
    """An operand at its starting scale max|x|/(2ᵇ⁻¹ − margin), which the largest magnitude of all its values gives; in
    float at 32 bits. unsigned: codes of tensors without negative values."""
    if bits == FLOAT:
        return Operand(values)
    unsigned = unsigned and all(bool((part >= 0).all()) for part in parts)
    largest = values.abs().amax(dim=1) if channels else torch.stack([part.abs().max() for part in parts]).max()
    low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    steps = high if unsigned else max(2 ** (bits - 1) - margin, 0.5)
    return Operand.of(values, starting_scale(largest, steps), low, high)


def starting_scale(largest: Tensor, steps: float) -> Tensor:
    """largest/steps; 1 where there is nothing to represent, where any scale does."""
    start = largest.double() / steps
    return torch.where(start > torch.finfo(torch.float32).tiny * 1e6, start, torch.ones_like(start)).float()


def quantizer_of(side: Operand, bits: int) -> Quantizer | None:
    """The quantizer with an operand's current scale; None for one that stays in float."""
    if side.scale is None:
        return None
    where = {"granularity": "channel", "axis": 0} if side.per_row else {}
    return Uniform(side.scale, None, bits, signed=side.low < 0, **where)  # type: ignore[arg-type]


def grouped_uniform(groups: str | Tensor | None, scale: Tensor, zero: Tensor, bits: int, *, signed: bool) -> Uniform:
    """The uniform format of an operand whose groups (of a :class:`~quantlens.calibration.ranges.guided.Side`) have
    scales and zero points [G]."""
    if isinstance(groups, Tensor):
        granularity = "channel" if len(scale) == len(groups) else "group"
        return Uniform(scale[groups], zero[groups], bits, signed=signed, granularity=granularity, axis=0)
    if groups == HEADS:
        return Uniform(scale, zero, bits, signed=signed, granularity="head", axis=-3)
    return Uniform(scale[0], zero[0], bits, signed=signed)
