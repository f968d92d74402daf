"""The search that base-ptq and easyquant share: for every product of the graph, the scales of its two operands by the
cosine similarity of the float and the quantized output, on the float model's tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlens.calibration import Calibration, Look, Walk
from quantlens.errors import QuantlensError
from quantlens.graph import Edge, Graph
from quantlens.graph.sites import Site
from quantlens.methods.base import (
    Option,
    Run,
    Widths,
    matmul_operand_edges,
)
from quantlens.quantizers import Plan, Quantizer, Uniform
from quantlens.quantizers.bits import FLOAT
from quantlens.ranges.similarity import Operand, alternate, candidate_factors, search

ROWS = 512
"""Tokens of a layer's input that candidates are judged on."""

ELEMENTS = 1 << 19
"""Elements of the larger operand (or result) of an attention product that candidates are judged on."""

OPERANDS = {
    "linear": ("weight", "input"),
    "conv": ("weight", "input"),
    "scores": ("q", "k"),
    "context": ("probs", "v"),
    "matmul": ("lhs", "rhs"),
}
"""Which operand of a product is searched first, which second."""


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
    if not 0 < settings.alpha < settings.beta or settings.candidates < 1 or settings.rounds < 1:
        raise QuantlensError(
            f"alpha={settings.alpha}, beta={settings.beta}, candidates={settings.candidates}, rounds={settings.rounds}:"
            " 0 < alpha < beta, and at least one candidate and round (for example 0.5, 1.2, 100, 1)"
        )
    factors = candidate_factors(settings.alpha, settings.beta, settings.candidates)
    wanted = {e.key for e in matmul_operand_edges(graph) if bits.of(graph, e) != FLOAT}
    products = [p for p in find_products(graph) if any(e.key in wanted for e in p.quantized)]
    by_last = {p.read[-1].key: p for p in products}
    quantizers: dict[str, Quantizer] = {}
    generator = torch.Generator().manual_seed(run.seed)

    def settle(last: Edge, look: Look) -> None:
        product = by_last[last.key]
        tensors = [look.tensors(edge) for edge in product.read]
        for edge, parts in zip(product.read, tensors, strict=True):
            if not all(bool(torch.isfinite(part).all()) for part in parts):
                raise QuantlensError(f"{edge.key}: values are not finite; check the weights and the calibration images")
        values = aligned(product.site, tensors, generator)
        together = values is not None
        if values is None:
            values = [sample([p.reshape(-1, p.shape[-1]) for p in parts], ROWS, generator) for parts in tensors]
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
                quantizers[edge.key] = Uniform(
                    side.scale,
                    torch.zeros_like(side.scale),
                    bits.of(graph, edge),
                    signed=side.low < 0,
                    granularity="channel" if side.per_row else "tensor",
                    axis=0 if side.per_row else None,
                )

    walk = Walk(graph, calibration, sequential=False, seed=run.seed)
    walk.run([p.read[-1] for p in products], settle, run.progress)
    return Plan({e.key: quantizers[e.key] for e in matmul_operand_edges(graph) if e.key in quantizers})


@dataclass(frozen=True)
class Product:
    """A layer or an attention product: where its operands are read, and the edges whose quantizers they get (those
    of the softmax output differ), as they are searched."""

    site: Site
    read: tuple[Edge, ...]
    quantized: tuple[Edge, ...]


def find_products(graph: Graph) -> list[Product]:
    """All products of a graph; a softmax output that no product reads stands alone."""
    probs = {site.node: site for site in graph.sites.of_kind("probs")}
    found = []
    for site in graph.sites:
        if site.kind not in OPERANDS:
            continue
        read = tuple(site.edges[name] for name in OPERANDS[site.kind])
        quantized = read
        if site.kind == "context":
            node: Any = site.node.args[0]
            while isinstance(node, fx.Node) and node not in probs and node.args:
                node = node.args[0]
            if node in probs:
                quantized = (probs.pop(node).edges["output"], read[1])
        found.append(Product(site, read, quantized))
    alone = [Product(site, (e := (site.edges["output"],)), e) for site in probs.values()]
    return found + alone


def aligned(site: Site, tensors: list[list[Tensor]], generator: torch.Generator) -> list[Tensor] | None:
    """Both operands of a product as [..., rows, k] with a common k, a sample of the images' rows or (image, head)
    pairs; ``None`` if they cannot be had."""
    if len(tensors) != 2:
        return None
    if site.kind == "linear":
        (weight,), inputs = tensors
        return [weight, sample([x.reshape(-1, x.shape[-1]) for x in inputs], ROWS, generator)]
    if site.kind == "conv":
        (weight,), images = tensors
        stride, padding, dilation = _convolution(site)
        if weight.dim() != 4 or isinstance(padding, str) or weight.shape[1] != images[0].shape[1]:
            return None
        share = -(-ROWS // len(images))
        rows = []
        for part in images:
            columns = nn.functional.unfold(part, tuple(weight.shape[2:]), dilation, padding, stride)
            rows.append(sample([columns.mT.reshape(-1, columns.shape[1])], share, generator))
        return [weight.flatten(1), sample(rows, ROWS, generator)]
    left, right = tensors
    if len(left) != len(right) or min(left[0].dim(), right[0].dim()) < 2:
        return None
    pairs: list[list[Tensor]] = [[], []]
    for a, b in zip(left, right, strict=True):
        lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a = a.expand(*lead, *a.shape[-2:]).reshape(-1, *a.shape[-2:])
        b = b.expand(*lead, *b.shape[-2:]).reshape(-1, *b.shape[-2:]).mT
        size = max(a[0].numel(), b[0].numel(), a.shape[-2] * b.shape[-2])
        index = torch.randperm(len(a), generator=generator)[: max(1, ELEMENTS // (size * len(left)))].to(a.device)
        pairs[0].append(a[index])
        pairs[1].append(b[index].contiguous())
    return [torch.cat(pairs[0]), torch.cat(pairs[1])]


def _convolution(site: Site) -> tuple[Any, Any, Any]:
    """Stride, padding and dilation of a convolution, filled in where the call leaves them out."""
    given = dict(enumerate(site.node.args[3:6]))
    return given.get(0, 1), given.get(1, 0), given.get(2, 1)


def sample(rows: list[Tensor], most: int, generator: torch.Generator) -> Tensor:
    """At most ``most`` rows of pieces [n, k], as many from each, without repetition."""
    share = -(-most // len(rows))
    picked = []
    for part in rows:
        if len(part) > share:
            part = part[torch.randperm(len(part), generator=generator)[:share].to(part.device)]
        picked.append(part)
    return torch.cat(picked).float()


def operand(
    values: Tensor, parts: list[Tensor], bits: int, settings: SearchSettings, *, channels: bool = False
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
