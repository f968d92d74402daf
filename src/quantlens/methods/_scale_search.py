"""What methods that search scales by the similarity of outputs share: every product of the graph with its two operands,
on the float model's tensors, as samples of a size that does not grow with the calibration set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlens.calibration import Calibration, Look, Walk
from quantlens.calibration.ranges.similarity import Operand, alternate, candidate_factors, search
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer, Uniform
from quantlens.graph import Edge, Graph
from quantlens.graph.sites import Site
from quantlens.methods.base import (
    Option,
    Run,
    Widths,
    matmul_operand_edges,
)
from quantlens.qmodel import Plan
from quantlens.qmodel.bits import FLOAT

ROWS = 512
"""Tokens of a layer's input that candidates are judged on."""

ELEMENTS = 1 << 19
"""Elements of the larger operand (or result) of an attention product that candidates are judged on."""

SAMPLES = 32
"""Images of a layer, or (image, head) pairs of an attention product, that a similarity per sample is averaged over."""

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
    generator = torch.Generator().manual_seed(run.seed)

    def settle(product: Product, tensors: list[list[Tensor]], wanted: set[str]) -> None:
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
                quantizers[edge.key] = quantizer_of(side, bits.of(graph, edge))

    visit_products(graph, calibration, bits, run, settle)
    return Plan({e.key: quantizers[e.key] for e in matmul_operand_edges(graph) if e.key in quantizers})


def visit_products(
    graph: Graph,
    calibration: Calibration,
    bits: Widths,
    run: Run,
    settle: Callable[[Product, list[list[Tensor]], set[str]], None],
) -> None:
    """Show ``settle`` every product that has an operand to be quantized: the product, the float values that each of its
    operands has (one tensor per chunk of images, one for a weight), and the keys of all edges to be quantized.

    Raises QuantlensError naming the edge where values are not finite.
    """
    wanted = {e.key for e in matmul_operand_edges(graph) if bits.of(graph, e) != FLOAT}
    products = [p for p in find_products(graph) if any(e.key in wanted for e in p.quantized)]
    by_last = {p.read[-1].key: p for p in products}

    def decide(last: Edge, look: Look) -> None:
        product = by_last[last.key]
        tensors = [look.tensors(edge) for edge in product.read]
        for edge, parts in zip(product.read, tensors, strict=True):
            if not all(bool(torch.isfinite(part).all()) for part in parts):
                raise QuantlensError(f"{edge.key}: values are not finite; check the weights and the calibration images")
        settle(product, tensors, wanted)

    walk = Walk(graph, calibration, sequential=False, seed=run.seed)
    walk.run([p.read[-1] for p in products], decide, run.progress)


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
        if not _unfolds(site, weight, images[0]):
            return None
        share = -(-ROWS // len(images))
        rows = []
        for part in images:
            rows.append(sample([_columns(site, weight, part).flatten(0, 1)], share, generator))
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


def by_sample(
    product: Product, tensors: list[list[Tensor]], images: int, generator: torch.Generator
) -> tuple[Tensor, Tensor] | None:
    """Operands left [s, m, k] and right [s, n, k] (a weight: [n, k]) of a product left·rightᵀ, sample by sample.

    A sample of a layer is a number of tokens of one image, of a product between activations a number of rows of one
    (image, head) pair. At most :data:`SAMPLES` samples, :data:`ROWS` tokens, and as many rows. images: how many there
    are. ``None`` if the operands cannot be had.
    """
    site = product.site
    if len(tensors) != 2:
        return None
    if "weight" in site.edges:
        (weight,), inputs = tensors
        if site.kind == "conv" and not _unfolds(site, weight, inputs[0]):
            return None
        axis = _batch_axis(product.read[1]) if site.kind == "linear" else 0
        sizes = [x.shape[axis] for x in inputs]
        counts = _images_per_piece(sizes, images)
        if any(count == 0 or size % count for size, count in zip(sizes, counts, strict=True)):
            return None
        picked = torch.randperm(images, generator=generator)[:SAMPLES].sort().values
        share, start, rows = max(1, ROWS // len(picked)), 0, []
        for part, count in zip(inputs, counts, strict=True):
            index = picked[(picked >= start) & (picked < start + count)] - start
            start += count
            if len(index) == 0:
                continue
            if site.kind == "conv":
                part = _columns(site, weight, part[index.to(part.device)])
            else:
                part = part.movedim(axis, 0)
                part = part.reshape(count, -1, part.shape[-1])[index.to(part.device)]
            rows.append(_rows_of_each(part, share, generator))
        return torch.cat(rows).float(), weight.flatten(1)
    left, right = tensors
    if len(left) != len(right) or min(left[0].dim(), right[0].dim()) < 2:
        return None
    pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
    share = -(-SAMPLES // len(left))
    for a, b in zip(left, right, strict=True):
        lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        index = torch.randperm(lead.numel(), generator=generator)[:share].to(a.device)
        where = torch.unravel_index(index, lead) if lead else ()
        a, b = (x.expand(*lead, *x.shape[-2:])[where] if lead else x[None] for x in (a, b))
        pairs[0].append(_rows_of_each(a, max(1, ROWS // 16), generator))
        pairs[1].append(b.mT.contiguous())
    return torch.cat(pairs[0]).float(), torch.cat(pairs[1]).float()


def _batch_axis(edge: Edge) -> int:
    """The dimension of an edge's value that grows with the number of images (images are its slowest part)."""
    shape = edge.value.meta.get("shape") or ()
    return next((i for i, size in enumerate(shape) if size is None), 0)


def _images_per_piece(sizes: list[int], images: int) -> list[int]:
    """How many of the images each piece holds, from the pieces' sizes, which are in proportion to it."""
    return [round(images * size / sum(sizes)) for size in sizes]


def _rows_of_each(values: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most ``most`` rows of each sample [s, m, k], other ones for each, without repetition."""
    count, rows = values.shape[:2]
    if rows <= most:
        return values
    index = torch.rand(count, rows, generator=generator).argsort(1)[:, :most].sort(1).values.to(values.device)
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _unfolds(site: Site, weight: Tensor, images: Tensor) -> bool:
    """Whether a convolution is a product of image patches and weight rows (one group, padding as numbers)."""
    return weight.dim() == 4 and not isinstance(_convolution(site)[1], str) and weight.shape[1] == images.shape[1]


def patches(site: Site, weight: Tensor, inputs: Tensor) -> Tensor | None:
    """[m, in] rows that the weight's rows meet, of a linear layer's inputs [..., in] or a convolution's images;
    ``None`` where there are none (groups, padding given as a word)."""
    if site.kind == "linear":
        return inputs.reshape(-1, inputs.shape[-1])
    return _columns(site, weight, inputs).flatten(0, 1) if _unfolds(site, weight, inputs) else None


def _columns(site: Site, weight: Tensor, images: Tensor) -> Tensor:
    """[n, positions, k] patches that a convolution's weight rows meet."""
    stride, padding, dilation = _convolution(site)
    return nn.functional.unfold(images, tuple(weight.shape[2:]), dilation, padding, stride).mT


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


def sample_tensor(values: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """[≤ most] values of a tensor of any shape, drawn with repetition if there are more."""
    flat = values.reshape(-1)
    if flat.numel() > most:
        flat = flat[torch.randint(flat.numel(), (most,), generator=generator).to(flat.device)]
    return flat.float()


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
