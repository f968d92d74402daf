"""The products of a graph, layers and products of the attention, with the operands that a search of their scales
needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlens.calibration import Calibration, CalibrationPass, EdgeView
from quantlens.errors import QuantlensError
from quantlens.graph import Edge, Graph, Site
from quantlens.graph.graph import argument

OPERANDS = {
    "linear": ("weight", "input"),
    "conv": ("weight", "input"),
    "scores": ("q", "k"),
    "context": ("probs", "v"),
    "matmul": ("lhs", "rhs"),
}
"""Which operand of a product is searched first, which second."""


@dataclass(frozen=True)
class Product:
    """A layer or an attention product: where its operands are read, and the edges whose quantizers they get (those
    of the softmax output differ), as they are searched."""

    site: Site
    read: tuple[Edge, ...]
    quantized: tuple[Edge, ...]


def find_products(graph: Graph) -> list[Product]:
    """All products of a graph; a softmax output that no product reads is one by itself."""
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


def visit_products(
    graph: Graph,
    calibration: Calibration,
    products: Iterable[Product],
    on_product: Callable[[Product, list[Sequence[Tensor]]], None],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Show ``on_product`` every product with the float values that each of its operands has: one tensor per chunk of
    images, one for a weight. Raises QuantlensError naming the edge where values are not finite."""
    by_last = {product.read[-1]: product for product in products}

    def on_edge(last: Edge, view: EdgeView) -> None:
        tensors = [view.tensors(edge) for edge in by_last[last].read]
        for edge, parts in zip(by_last[last].read, tensors, strict=True):
            for part in parts:
                check_finite(edge.key, part)
        on_product(by_last[last], tensors)

    CalibrationPass(graph, calibration, sequential=False, seed=seed).run(list(by_last), on_edge, progress)


def check_finite(key: str, values: Tensor) -> None:
    """Raises QuantlensError naming the edge ``key`` where values are not finite."""
    if not bool(torch.isfinite(values).all()):
        raise QuantlensError(f"{key}: values are not finite; check the weights and the calibration images")


def tokens(values: Tensor) -> Tensor:
    """Values [..., k] as rows [n, k]."""
    return values.reshape(-1, values.shape[-1])


def patches(site: Site, weight: Tensor, inputs: Tensor) -> Tensor | None:
    """[m, in] rows that the weight's rows meet, of a linear layer's inputs [..., in] or a convolution's images;
    ``None`` where there are none (groups, padding given as a word)."""
    if site.kind == "linear":
        return tokens(inputs)
    found = image_patches(site, weight, inputs)
    return None if found is None else found.flatten(0, 1)


def image_patches(site: Site, weight: Tensor, images: Tensor) -> Tensor | None:
    """[n, positions, k] patches that a convolution's weight rows meet; ``None`` where it is no product of these: with
    groups, or padding given as a word."""
    stride, padding, dilation = (argument(site.node, name) for name in ("stride", "padding", "dilation"))
    if weight.dim() != 4 or isinstance(padding, str) or weight.shape[1] != images.shape[1]:
        return None
    return nn.functional.unfold(images, tuple(weight.shape[2:]), dilation, padding, stride).mT  # type: ignore[arg-type]
