"""Operands of every product of a graph on a sample of rows, with the gradient of a loss at the product's output: what a
gradient-guided search judges candidates on, in one pass over the calibration images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantlens.calibration import CHUNK, Calibration
from quantlens.calibration.ranges.guided import sample_rows
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer
from quantlens.graph import Graph
from quantlens.graph.graph import EdgeHook
from quantlens.graph.sites import Site
from quantlens.methods._scale_search import Product
from quantlens.metrics.divergence import kl_of_logits
from quantlens.reconstruction.block_metrics import images_together

ROWS = 512
"""Rows (tokens) of a layer's input that are kept."""

PAIR_ROWS = 1024
"""Query rows of an attention product that are kept, at most :data:`PER_PAIR` of one image (or window)."""

PER_PAIR = 64

Loss = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(logits with gradient [B, K], logits of the float model [B, K], generator) -> the loss, summed over the images."""


def fisher(logits: Tensor, reference: Tensor, generator: torch.Generator) -> Tensor:
    """A linear function of the logits whose gradient v at them is random with E[v·vᵀ] = diag(p) − p·pᵀ, the Hessian of
    KL(p ‖ softmax(logits)): v = √p∘ξ − p·Σ√p∘ξ, ξ normal. At any value before the logits, the squared gradient is
    then the Fisher matrix's diagonal in expectation."""
    p = reference.softmax(-1)
    noise = torch.randn(p.shape, generator=generator).to(p) * p.sqrt()
    return (logits * (noise - p * noise.sum(-1, keepdim=True))).sum()


def divergence(logits: Tensor, reference: Tensor, generator: torch.Generator) -> Tensor:
    """KL(softmax(reference) ‖ softmax(logits))."""
    return kl_of_logits(reference, logits, "sum")


def own_label(logits: Tensor, reference: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy against the float model's own top-1."""
    return nn.functional.cross_entropy(logits, reference.argmax(-1), reduction="sum")


@dataclass
class Sample:
    """What a product's candidates are judged on.

    operands: both sides as they are searched [..., rows, k], the weight of a layer first. gradient [..., rows of the
    first, rows of the second]: gradients times √(1/π) of the rows' probabilities, largest 1; ``None`` without a loss
    or where all gradients are zero. joined: whether the operands form a product (else each is matched alone).
    largest: largest magnitude by read edge, of all images, [] or, of operands with heads, [heads].
    """

    operands: list[Tensor] = field(default_factory=list)
    gradient: Tensor | None = None
    joined: bool = True
    largest: dict[str, Tensor] = field(default_factory=dict)


def collect(
    graph: Graph,
    calibration: Calibration,
    products: list[Product],
    loss: Loss | None,
    *,
    coarse: dict[str, Quantizer] | None = None,
    floor: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Sample]:
    """Samples of ``products`` by site name. Operands are those of the float model; ``None`` for loss: no gradients.

    coarse: quantizers by edge key under which the loss is evaluated (its gradients are then those of the quantized
    model), ``None`` for the float model. floor: squared gradients are raised by so many times their layer's mean, which
    adds plain squared error to the weighted one (what is kept are magnitudes then, without sign).

    Memory: the sample, and the activations of as many images as :func:`images_together` allows. Raises
    QuantlensError naming the edge where values are not finite.
    """
    if loss is not None and (
        torch.is_inference_mode_enabled() or any(t.is_inference() for t in graph.tensors().values())
    ):
        raise QuantlensError(
            "this method needs gradients: load and quantize the model outside torch.inference_mode() (torch.no_grad() "
            "does no harm)"
        )
    together = images_together(graph, 1 if coarse is None else 2)
    pieces = sum(math.ceil(min(CHUNK, len(calibration) - i * CHUNK) / together) for i in range(calibration.pieces))
    collector = _Collector(graph, products, seed, pieces, floor)
    done = 0
    for chunk in calibration:
        for images in chunk.chunk(math.ceil(len(chunk) / together)):
            collector.batch(images, loss, coarse)
            done += 1
            if progress is not None:
                progress(done, pieces)
    return collector.result()


class _Collector:
    def __init__(self, graph: Graph, products: list[Product], seed: int, pieces: int, floor: float):
        self.graph, self.products, self.pieces, self.floor = graph, products, pieces, floor
        self.generator = torch.Generator().manual_seed(seed)
        self.nodes = [n for n in graph.fx.nodes if n.op == "call_function"]
        self.samples = {p.site.name: Sample() for p in products}
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
        _check(edge.key, top)
        return weight

    def batch(self, images: Tensor, loss: Loss | None, coarse: dict[str, Quantizer] | None) -> None:
        """Take the samples of one batch of images."""
        self.seen = {}
        logits = self._run(images, self._look) if loss is None or coarse is not None else None
        if loss is not None:
            with torch.enable_grad():
                out = self._run(images.clone().requires_grad_(True), self._listen(coarse))
                loss(out, out.detach() if logits is None else logits, self.generator).backward()
        for product in self.products:
            if loss is None or len(product.read) == 1:
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
            _check(key, top)
            largest = self.samples[product.site.name].largest
            largest[key] = torch.maximum(largest[key], top) if key in largest else top
            self.seen[key] = kept
        return value

    def _listen(self, coarse: dict[str, Quantizer] | None) -> EdgeHook:
        """A hook that takes a product's rows when the gradient at its output arrives."""

        def hook(key: str, value: Tensor) -> Tensor:
            if key in self.makes:
                value.register_hook(lambda g: self._take(self.makes[key], g))
            if coarse is None:
                return self._look(key, value)
            return coarse[key](value) if key in coarse else value

        return hook

    def _take(self, product: Product, gradient: Tensor | None) -> None:
        """Add this batch's rows of a product."""
        name, site = product.site.name, product.site
        values = [self.weights[name] if e.is_weight else self.seen.pop(e.key) for e in product.read]
        rows = None
        if gradient is not None and self.floor:
            squared = gradient.square()
            gradient = squared.add_(self.floor * squared.mean()).sqrt_()
        if site.kind == "linear":
            rows = values[1].reshape(-1, values[1].shape[-1])
        elif site.kind == "conv":
            rows = columns(site, values[0], values[1])
            gradient = None if gradient is None else gradient.flatten(2).mT
        if rows is not None:
            self.parts[name].append((self._rows(name, rows, gradient, -(-ROWS // self.pieces)),))
        elif len(values) == 2 and site.kind != "conv" and min(v.dim() for v in values) >= 2:
            left, right, kept = sample_pairs(values[0], values[1], gradient, self.pieces, self.generator)
            self.parts[name].append((left, right))
            if kept is not None:
                self.gradients[name].append(kept)
        else:
            self.samples[name].joined = False
            flat = [
                v.flatten(1) if e.is_weight else v.reshape(-1, v.shape[-1])
                for v, e in zip(values, product.read, strict=True)
            ]
            self.parts[name].append(tuple(self._rows(name, v, None, -(-ROWS // self.pieces)) for v in flat))

    def _rows(self, name: str, rows: Tensor, gradient: Tensor | None, most: int) -> Tensor:
        """Some of rows [n, k], with the gradients [..., out] of n outputs."""
        if gradient is None:
            return rows[sample_rows(torch.ones(len(rows), device=rows.device), most, self.generator)[0]]
        gradient = gradient.reshape(len(rows), -1)
        index, weight = sample_rows(gradient.square().sum(1), most, self.generator)
        self.gradients[name].append(gradient[index] * weight.sqrt()[:, None])
        return rows[index]

    def result(self) -> dict[str, Sample]:
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


def sample_pairs(
    left: Tensor, right: Tensor, gradient: Tensor | None, pieces: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Some rows of some of the matrices of left [..., r, k] and right [..., k, c] with the gradients [..., r, c] of
    their products.

    Returns left [pairs, heads, r', k], right [pairs, heads, c, k], gradient [pairs, heads, r', c], times √(1/π); the
    last leading dimension counts as heads. pieces: batches that share :data:`PAIR_ROWS`.
    """
    lead = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    heads = lead[-1] if len(lead) >= 2 else 1

    def by_pair(x: Tensor) -> Tensor:
        return x.expand(*lead, *x.shape[-2:]).reshape(-1, heads, *x.shape[-2:])

    left, right = by_pair(left), by_pair(right)
    gradient = None if gradient is None else by_pair(gradient)
    most = min(PER_PAIR, left.shape[2])
    if gradient is None:
        importance = torch.ones(left.shape[0], left.shape[2], device=left.device)
    else:
        importance = gradient.square().sum((1, 3))
    pairs, share = sample_rows(importance.sum(1), -(-PAIR_ROWS // (most * pieces)), generator)
    rows, weight = sample_rows(importance[pairs], most, generator)
    index = rows[:, None, :, None]
    kept = None
    if gradient is not None:
        kept = torch.take_along_dim(gradient[pairs], index, 2)
        kept = kept * (share[:, None] * weight).sqrt()[:, None, :, None]
    return torch.take_along_dim(left[pairs], index, 2), right[pairs].mT.contiguous(), kept


def columns(site: Site, weight: Tensor, images: Tensor) -> Tensor | None:
    """What each output position of a convolution reads: [batch·positions, channels·kernel], positions of one image
    side by side; ``None`` for groups or a padding given as a word."""
    given = dict(enumerate(site.node.args[3:6]))
    stride, padding, dilation = given.get(0, 1), given.get(1, 0), given.get(2, 1)
    if weight.dim() != 4 or isinstance(padding, str) or weight.shape[1] != images.shape[1]:
        return None
    found = nn.functional.unfold(images, tuple(weight.shape[2:]), dilation, padding, stride)  # type: ignore[arg-type]
    return found.mT.reshape(-1, found.shape[1])


def _check(key: str, largest: Tensor) -> None:
    if not bool(torch.isfinite(largest).all()):
        raise QuantlensError(f"{key}: values are not finite; check the weights and the calibration images")
