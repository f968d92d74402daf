"""Samples of the operands of every product of a graph, with the gradient of a loss at the product's output: what a
gradient-guided search judges candidates on, in one pass over the calibration images."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantlens.calibration.images import CHUNK, Calibration, images_together
from quantlens.calibration.sampling import Product, ProductSampler, check_finite, matrices, patches, tokens
from quantlens.graph import Graph

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
        self.graph, self.products, self.sampler, self.pieces, self.floor = graph, products, sampler, pieces, floor
        self.nodes = [n for n in graph.fx.nodes if n.op == "call_function"]
        self.samples = {p.site.name: ProductSample() for p in products}
        self.parts: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in self.samples}
        self.gradients: dict[str, list[Tensor]] = {name: [] for name in self.samples}
        self.reads = {e.key: p for p in products for e in p.read if not e.is_weight}
        self.makes = {p.site.edges["output"].key: p for p in products if len(p.read) == 2}
        self.seen: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        for product in products:
            if product.read[0].is_weight:
                edge, name = product.read[0], product.site.name
                self.weights[name] = self._looked_at(product, edge.key, graph.tensor(str(edge.value.target)).float())

    # -- one batch --------------------------------------------------------------------------------------------------
    def batch(self, images: Tensor, loss: Loss) -> None:
        """Take the samples of one batch of images."""
        output = self.graph.output
        with torch.enable_grad():
            env = {self.graph.input: images.clone().requires_grad_(True)}
            logits = self.graph.run(self.nodes, env, hook=self._hook, keep=[output])[output]
            loss(logits, logits.detach(), self.sampler.generator).backward()
        for product in self.products:  # those that no gradient came to: what is measured does not depend on them
            if not self.seen.keys().isdisjoint(e.key for e in product.read):
                self._take(product, None)
        self.seen = {}

    def _hook(self, key: str, value: Tensor) -> Tensor:
        """Look at an operand, and take a product's rows when the gradient at its output arrives."""
        if key in self.makes:
            value.register_hook(lambda g: self._take(self.makes[key], g))
        if key in self.reads:
            self.seen[key] = self._looked_at(self.reads[key], key, value.detach())
        return value

    def _looked_at(self, product: Product, key: str, value: Tensor) -> Tensor:
        """An operand, checked, its largest magnitude (by head for [batch, heads, rows, cols]) noted."""
        heads = value.dim() == 4 and product.site.kind in ("scores", "context")
        top = value.abs().amax((0, 2, 3)) if heads else value.abs().max()
        check_finite(key, top)
        largest = self.samples[product.site.name].largest
        largest[key] = torch.maximum(largest[key], top) if key in largest else top
        return value

    # -- one product ------------------------------------------------------------------------------------------------
    def _take(self, product: Product, gradient: Tensor | None) -> None:
        """Add this batch's rows of a product."""
        name, site = product.site.name, product.site
        values = [self.weights[name] if e.is_weight else self.seen.pop(e.key) for e in product.read]
        if gradient is not None and self.floor:
            squared = gradient.square()
            gradient = squared.add_(self.floor * squared.mean()).sqrt_()
        rows, kept = patches(site, values[0], values[1]) if name in self.weights else None, None
        if rows is not None:
            if site.kind == "conv" and gradient is not None:
                gradient = gradient.flatten(2).mT
            *parts, kept = self.sampler.weighted_rows(rows, gradient, self.pieces)
        elif len(values) == 2 and site.kind != "conv" and matrices(*([v] for v in values)):
            *parts, kept = self.sampler.weighted_pairs(values[0], values[1], gradient, self.pieces)
        else:
            self.samples[name].joined = False
            flat = [v.flatten(1) if e.is_weight else tokens(v) for v, e in zip(values, product.read, strict=True)]
            parts = [self.sampler.weighted_rows(v, None, self.pieces)[0] for v in flat]
        self.parts[name].append(tuple(parts))
        if kept is not None:
            self.gradients[name].append(kept)

    def result(self) -> dict[str, ProductSample]:
        for name, sample in self.samples.items():
            layer = name in self.weights
            parts = [torch.cat(p).float() for p in zip(*self.parts.pop(name), strict=True)]
            sample.operands = [self.weights[name].flatten(1), parts[-1]] if layer else parts
            gradients = self.gradients.pop(name)
            if gradients:
                gradient = torch.cat(gradients).float()
                top = gradient.abs().max()
                if bool(top > 0) and bool(torch.isfinite(top)):
                    sample.gradient = (gradient / top).mT.contiguous() if layer else gradient / top
        return self.samples
