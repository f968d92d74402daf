"""Samples of the operands of every product of a graph, with the gradient of a loss at the product's output: what a
gradient-guided search judges candidates on, in one pass over the calibration images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantlens.calibration.images import CHUNK, Calibration, images_together
from quantlens.calibration.products import Product, check_finite, patches
from quantlens.calibration.sampling import ProductSampler
from quantlens.graph import Graph
from quantlens.graph.graph import EdgeHook

Loss = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(logits with gradient [B, K], logits of the float model [B, K], generator) -> the loss, summed over the images."""


@dataclass
class ProductSample:
    """What a product's candidates are judged on.

    operands: both sides as they are searched [..., rows, k], the weight of a layer first. gradient [..., rows of the
    first, rows of the second]: gradients times √(1/π) of the rows' probabilities, largest 1;
    ``None`` where all gradients are zero. joined: whether the operands form a product (else each is matched alone).
    largest: largest magnitude by read edge, of all images, [] or, of operands with heads, [heads].
    """

    operands: list[Tensor] = field(default_factory=list)
    gradient: Tensor | None = None
    joined: bool = True
    largest: dict[str, Tensor] = field(default_factory=dict)


def sample_products(
    graph: Graph,
    calibration: Calibration,
    products: list[Product],
    sampler: ProductSampler,
    loss: Loss,
    *,
    floor: float = 0.0,
) -> dict[str, ProductSample]:
    """Samples of ``products`` by site name, operands and gradients those of the float model.

    floor: squared gradients are raised by so many times their layer's mean, which
    adds plain squared error to the weighted one (what is kept are magnitudes then, without sign).

    Memory: the sample, and the activations of as many images as :func:`images_together` allows. Raises
    QuantlensError naming the edge where values are not finite.
    """
    together = images_together(graph, 1)
    pieces = sum(math.ceil(min(CHUNK, len(calibration) - i * CHUNK) / together) for i in range(calibration.pieces))
    collector = _Collector(graph, products, sampler, pieces, floor)
    for chunk in calibration:
        for images in chunk.chunk(math.ceil(len(chunk) / together)):
            collector.batch(images, loss)
    return collector.result()


class _Collector:
    """Takes each batch's rows of every product: as soon as the gradient at its output is there, or after the batch."""

    def __init__(self, graph: Graph, products: list[Product], sampler: ProductSampler, pieces: int, floor: float):
        self.graph, self.products, self.pieces, self.floor = graph, products, pieces, floor
        self.sampler = sampler
        self.nodes = [n for n in graph.fx.nodes if n.op == "call_function"]
        self.samples = {p.site.name: ProductSample() for p in products}
        self.parts: dict[str, list[tuple[Tensor, ...]]] = {p.site.name: [] for p in products}
        self.gradients: dict[str, list[Tensor]] = {p.site.name: [] for p in products}
        self.reads = {e.key: p for p in products for e in p.read if not e.is_weight}
        self.makes = {p.site.edges["output"].key: p for p in products if len(p.read) == 2}
        self.weights = {p.site.name: self._weight(p) for p in products if p.read[0].is_weight}
        self.seen: dict[str, Tensor] = {}

    def _weight(self, product: Product) -> Tensor:
        """The weight of a layer, checked."""
        edge = product.read[0]
        weight = self.graph.tensor(str(edge.value.target)).float()
        self.samples[product.site.name].largest[edge.key] = top = weight.abs().max()
        check_finite(edge.key, top)
        return weight

    # -- one batch --------------------------------------------------------------------------------------------------
    def batch(self, images: Tensor, loss: Loss) -> None:
        """Take the samples of one batch of images."""
        self.seen = {}
        with torch.enable_grad():
            out = self._run(images.clone().requires_grad_(True), self._listen)
            loss(out, out.detach(), self.sampler.generator).backward()
        for product in self.products:
            if len(product.read) == 1:
                self._take(product, None)

    def _run(self, images: Tensor, hook: EdgeHook) -> Tensor:
        output = self.graph.output
        return self.graph.run(self.nodes, {self.graph.input: images}, hook=hook, keep=[output])[output]

    def _look(self, key: str, value: Tensor) -> Tensor:
        """Keep an operand and its largest magnitude (by head for [batch, heads, rows, cols])."""
        if key in self.reads:
            kept, product = value.detach(), self.reads[key]
            heads = kept.dim() == 4 and product.site.kind in ("scores", "context")
            top = kept.abs().amax((0, 2, 3)) if heads else kept.abs().max()
            check_finite(key, top)
            largest = self.samples[product.site.name].largest
            largest[key] = torch.maximum(largest[key], top) if key in largest else top
            self.seen[key] = kept
        return value

    def _listen(self, key: str, value: Tensor) -> Tensor:
        """Look at an operand, and take a product's rows when the gradient at its output arrives."""
        if key in self.makes:
            value.register_hook(lambda g: self._take(self.makes[key], g))
        return self._look(key, value)

    # -- one product ------------------------------------------------------------------------------------------------
    def _take(self, product: Product, gradient: Tensor | None) -> None:
        """Add this batch's rows of a product."""
        name, site = product.site.name, product.site
        values = [self.weights[name] if e.is_weight else self.seen.pop(e.key) for e in product.read]
        if gradient is not None and self.floor:
            squared = gradient.square()
            gradient = squared.add_(self.floor * squared.mean()).sqrt_()
        rows = patches(site, values[0], values[1]) if site.kind in ("linear", "conv") else None
        if rows is not None:
            if site.kind == "conv" and gradient is not None:
                gradient = gradient.flatten(2).mT
            self._add(name, *self.sampler.weighted_rows(rows, gradient, self.pieces))
        elif len(values) == 2 and site.kind != "conv" and min(v.dim() for v in values) >= 2:
            left, right, kept = self.sampler.weighted_pairs(values[0], values[1], gradient, self.pieces)
            self._add(name, left, kept, right)
        else:
            self.samples[name].joined = False
            flat = [
                v.flatten(1) if e.is_weight else v.reshape(-1, v.shape[-1])
                for v, e in zip(values, product.read, strict=True)
            ]
            self.parts[name].append(tuple(self.sampler.weighted_rows(v, None, self.pieces)[0] for v in flat))

    def _add(self, name: str, first: Tensor, gradient: Tensor | None, *others: Tensor) -> None:
        self.parts[name].append((first, *others))
        if gradient is not None:
            self.gradients[name].append(gradient)

    def result(self) -> dict[str, ProductSample]:
        for product in self.products:
            name = product.site.name
            sample, layer = self.samples[name], product.site.kind in ("linear", "conv")
            parts = [torch.cat(p).float() for p in zip(*self.parts.pop(name), strict=True)]
            gradients = self.gradients.pop(name)
            if layer and sample.joined:
                parts = [self.weights[name].flatten(1), *parts]
            elif layer:
                parts[0] = self.weights[name].flatten(1)
            sample.operands = parts
            if gradients:
                gradient = torch.cat(gradients).float()
                top = gradient.abs().max()
                if bool(top > 0) and bool(torch.isfinite(top)):
                    sample.gradient = (gradient / top).mT.contiguous() if layer else gradient / top
        return self.samples
