"""The products of a graph, and samples of their operands, on which candidates are judged: of a size that does not grow
with the number of calibration images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlens.calibration.images import Calibration
from quantlens.calibration.passes import CalibrationPass, EdgeView
from quantlens.calibration.ranges.guided import sample_rows
from quantlens.errors import QuantlensError
from quantlens.graph import Edge, Graph, Site, argument

# -- products ------------------------------------------------------------------------------------------------------
# The products of a graph, layers and products of the attention, with the operands that a search of their scales
# needs.


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
    return found + [Product(site, (e := (site.edges["output"],)), e) for site in probs.values()]


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


# -- samples ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ProductSampler:
    """Draws samples, all of them from one generator on the CPU.

    rows: tokens of a layer's input. elements: of the larger operand (or result) of an attention product. samples:
    images of a layer, or (image, head) pairs of an attention product, for rules that average over samples. pair_rows:
    query rows of an attention product where rows are drawn by their gradients, at most ``per_pair`` of one image (or
    window).
    """

    generator: torch.Generator
    rows: int = 512
    elements: int = 1 << 19
    samples: int = 32
    pair_rows: int = 1024
    per_pair: int = 64

    # -- of one operand -------------------------------------------------------------------------------------------
    def some_rows(
        self, pieces: Sequence[Tensor], most: int | None = None, *, rows_of: Callable[[Tensor], Any] = tokens
    ) -> Tensor:
        """At most ``most`` (``rows``) rows of pieces, as many from each, without repetition. rows_of: piece -> its rows
        [n, k]."""
        share, picked = -(-(self.rows if most is None else most) // len(pieces)), []
        for piece in pieces:
            rows = rows_of(piece)
            if len(rows) > share:
                rows = rows[torch.randperm(len(rows), generator=self.generator)[:share].to(rows.device)]
            picked.append(rows)
        return torch.cat(picked).float()

    def each_alone(self, tensors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Every operand as rows [m, k] of its own: for operands that do not make a product of matrices."""
        return [self.some_rows(parts) for parts in tensors]

    def some_values(self, values: Tensor, most: int) -> Tensor:
        """[≤ most] values of a tensor of any shape, drawn with repetition if there are more."""
        flat = values.reshape(-1)
        if flat.numel() > most:
            flat = flat[torch.randint(flat.numel(), (most,), generator=self.generator).to(flat.device)]
        return flat.float()

    # -- of both, any tokens --------------------------------------------------------------------------------------
    def joined(self, product: Product, tensors: Sequence[Sequence[Tensor]]) -> list[Tensor] | None:
        """Both operands of a product as [..., rows, k] with a common k, a sample of the images' rows or (image, head)
        pairs; ``None`` if they cannot be had."""
        if len(tensors) != 2:
            return None
        site, (left, right) = product.site, tensors
        if "weight" in site.edges:
            rows_of = partial(patches, site, left[0])
            if rows_of(right[0][:1]) is None:
                return None
            return [left[0].flatten(1), self.some_rows(right, rows_of=rows_of)]
        if not matrices(left, right):
            return None
        (rows, k), columns = left[0].shape[-2:], right[0].shape[-1]
        size = max(rows * k, k * columns, rows * columns)
        pairs = self._pairs(left, right, max(1, self.elements // (size * len(left))))
        return [torch.cat(both) for both in zip(*pairs, strict=True)]

    def _pairs(self, left: Sequence[Tensor], right: Sequence[Tensor], most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """At most ``most`` (image, head) pairs of every chunk of left [..., r, k] and right [..., k, c]: [n, r, k] and
        [n, c, k]."""
        for a, b in zip(left, right, strict=True):
            lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
            index = torch.randperm(lead.numel(), generator=self.generator)[:most].to(a.device)
            where = torch.unravel_index(index, lead) if lead else None
            a, b = (x[where] for x in _broadcast(a, b))
            yield a, b.mT.contiguous()

    # -- of both, sample by sample --------------------------------------------------------------------------------
    def by_sample(
        self, product: Product, tensors: Sequence[Sequence[Tensor]], images: int
    ) -> tuple[Tensor, Tensor] | None:
        """Operands left [s, m, k] and right [s, n, k] (a weight: [n, k]) of a product left·rightᵀ, sample by sample.

        A sample of a layer is a number of tokens of one image, of a product between activations a number of rows of
        one (image, head) pair; all tokens and all rows together are at most ``rows`` each. images: how many there are.
        ``None`` if the operands cannot be had.
        """
        if len(tensors) != 2:
            return None
        left, right = tensors
        if "weight" in product.site.edges:
            rows = self._tokens_by_image(product, left[0], right, images)
            return None if rows is None else (rows, left[0].flatten(1))
        if not matrices(left, right):
            return None
        pairs = self._pairs(left, right, -(-self.samples // len(left)))
        some = [(self._rows_of_each(a, max(1, self.rows // 16)), b) for a, b in pairs]
        first, second = (torch.cat(both).float() for both in zip(*some, strict=True))
        return first, second

    def _tokens_by_image(
        self, product: Product, weight: Tensor, inputs: Sequence[Tensor], images: int
    ) -> Tensor | None:
        """[s, m, k] tokens of some images that a layer reads."""
        site, conv = product.site, product.site.kind == "conv"
        if conv and image_patches(site, weight, inputs[0][:1]) is None:
            return None
        shape = product.read[1].value.meta.get("shape") or ()
        # the dimension that grows with the number of images, which are its slowest part
        axis = 0 if conv else next((i for i, size in enumerate(shape) if size is None), 0)
        sizes = [x.shape[axis] for x in inputs]
        counts = [round(images * size / sum(sizes)) for size in sizes]  # images of each piece
        if any(count == 0 or size % count for size, count in zip(sizes, counts, strict=True)):
            return None
        picked = torch.randperm(images, generator=self.generator)[: self.samples].sort().values
        start, rows = 0, []
        for part, count in zip(inputs, counts, strict=True):
            index = picked[(picked >= start) & (picked < start + count)] - start
            start += count
            if len(index):
                some = part.movedim(axis, 0).unflatten(0, (count, -1))[index.to(part.device)]
                found: Any = image_patches(site, weight, some.flatten(0, 1)) if conv else some.flatten(1, -2)
                rows.append(self._rows_of_each(found, max(1, self.rows // len(picked))))
        return torch.cat(rows).float()

    def _rows_of_each(self, values: Tensor, most: int) -> Tensor:
        """At most ``most`` rows of each sample [s, m, k], other ones for each, without repetition."""
        count, rows = values.shape[:2]
        if rows <= most:
            return values
        index = torch.rand(count, rows, generator=self.generator).argsort(1)[:, :most].sort(1).values.to(values.device)
        return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))

    # -- of both, by their gradients ------------------------------------------------------------------------------
    def weighted_rows(self, rows: Tensor, gradient: Tensor | None, pieces: int) -> tuple[Tensor, Tensor | None]:
        """Some of rows [n, k], and the gradients [..., out] of their outputs times √(1/π), π the rows' probabilities.
        pieces: batches that share ``self.rows``."""
        gradient = None if gradient is None else gradient.reshape(len(rows), -1)
        importance = torch.ones(len(rows), device=rows.device) if gradient is None else gradient.square().sum(1)
        index, weight = sample_rows(importance, -(-self.rows // pieces), self.generator)
        return rows[index], None if gradient is None else gradient[index] * weight.sqrt()[:, None]

    def weighted_pairs(
        self, left: Tensor, right: Tensor, gradient: Tensor | None, pieces: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Some rows of some of the matrices of left [..., r, k] and right [..., k, c] with the gradients [..., r, c] of
        their products.

        Returns left [pairs, heads, r', k], right [pairs, heads, c, k], gradient [pairs, heads, r', c], times √(1/π);
        the last leading dimension counts as heads. pieces: batches that share ``self.pair_rows``.
        """
        left, right = _broadcast(left, right)
        heads = left.shape[-3] if left.dim() >= 4 else 1
        left, right = (x.reshape(-1, heads, *x.shape[-2:]) for x in (left, right))
        gradient = None if gradient is None else gradient.reshape(-1, heads, *gradient.shape[-2:])
        most = min(self.per_pair, left.shape[2])
        if gradient is None:
            importance = torch.ones(left.shape[0], left.shape[2], device=left.device)
        else:
            importance = gradient.square().sum((1, 3))
        pairs, share = sample_rows(importance.sum(1), -(-self.pair_rows // (most * pieces)), self.generator)
        rows, weight = sample_rows(importance[pairs], most, self.generator)
        index = rows[:, None, :, None]
        kept = None
        if gradient is not None:
            kept = torch.take_along_dim(gradient[pairs], index, 2)
            kept = kept * (share[:, None] * weight).sqrt()[:, None, :, None]
        return torch.take_along_dim(left[pairs], index, 2), right[pairs].mT.contiguous(), kept


def matrices(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether operands in pieces make products of matrices."""
    return len(left) == len(right) and min(left[0].dim(), right[0].dim()) >= 2


def _broadcast(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Operands [..., r, k] and [..., k, c] with the same leading dimensions."""
    lead = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    return left.expand(*lead, *left.shape[-2:]), right.expand(*lead, *right.shape[-2:])
