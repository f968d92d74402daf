"""Samples of the operands of products, on which candidates are judged: of a size that does not grow with the number of
calibration images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlens.calibration.products import Product, image_patches
from quantlens.calibration.ranges.guided import sample_rows
from quantlens.graph import Edge


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
    def some_rows(self, pieces: Sequence[Tensor], most: int | None = None) -> Tensor:
        """At most ``most`` (``rows``) rows of pieces [n, k], as many from each, without repetition."""
        share = -(-(self.rows if most is None else most) // len(pieces))
        picked = []
        for part in pieces:
            if len(part) > share:
                part = part[torch.randperm(len(part), generator=self.generator)[:share].to(part.device)]
            picked.append(part)
        return torch.cat(picked).float()

    def each_alone(self, tensors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Every operand as rows [m, k] of its own: for operands that do not make a product of matrices."""
        return [self.some_rows([part.reshape(-1, part.shape[-1]) for part in parts]) for parts in tensors]

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
        if site.kind == "linear":
            return [left[0], self.some_rows([x.reshape(-1, x.shape[-1]) for x in right])]
        if site.kind == "conv":
            share = -(-self.rows // len(right))
            found = []
            for part in right:
                rows = image_patches(site, left[0], part)
                if rows is None:
                    return None
                found.append(self.some_rows([rows.flatten(0, 1)], share))
            return [left[0].flatten(1), self.some_rows(found)]
        return self._pairs(left, right)

    def _pairs(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor] | None:
        """Whole matrices of some (image, head) pairs."""
        if len(left) != len(right) or min(left[0].dim(), right[0].dim()) < 2:
            return None
        pairs: list[list[Tensor]] = [[], []]
        for a, b in zip(left, right, strict=True):
            lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
            a = a.expand(*lead, *a.shape[-2:]).reshape(-1, *a.shape[-2:])
            b = b.expand(*lead, *b.shape[-2:]).reshape(-1, *b.shape[-2:]).mT
            size = max(a[0].numel(), b[0].numel(), a.shape[-2] * b.shape[-2])
            index = torch.randperm(len(a), generator=self.generator)
            index = index[: max(1, self.elements // (size * len(left)))].to(a.device)
            pairs[0].append(a[index])
            pairs[1].append(b[index].contiguous())
        return [torch.cat(pairs[0]), torch.cat(pairs[1])]

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
        if len(left) != len(right) or min(left[0].dim(), right[0].dim()) < 2:
            return None
        pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
        share = -(-self.samples // len(left))
        for a, b in zip(left, right, strict=True):
            lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
            index = torch.randperm(lead.numel(), generator=self.generator)[:share].to(a.device)
            where = torch.unravel_index(index, lead) if lead else ()
            a, b = (x.expand(*lead, *x.shape[-2:])[where] if lead else x[None] for x in (a, b))
            pairs[0].append(self._rows_of_each(a, max(1, self.rows // 16)))
            pairs[1].append(b.mT.contiguous())
        return torch.cat(pairs[0]).float(), torch.cat(pairs[1]).float()

    def _tokens_by_image(
        self, product: Product, weight: Tensor, inputs: Sequence[Tensor], images: int
    ) -> Tensor | None:
        """[s, m, k] tokens of some images that a layer reads."""
        site = product.site
        conv = site.kind == "conv"
        if conv and image_patches(site, weight, inputs[0][:1]) is None:
            return None
        axis = 0 if conv else _batch_axis(product.read[1])
        sizes = [x.shape[axis] for x in inputs]
        counts = [round(images * size / sum(sizes)) for size in sizes]  # images of each piece
        if any(count == 0 or size % count for size, count in zip(sizes, counts, strict=True)):
            return None
        picked = torch.randperm(images, generator=self.generator)[: self.samples].sort().values
        share, start, rows = max(1, self.rows // len(picked)), 0, []
        for part, count in zip(inputs, counts, strict=True):
            index = picked[(picked >= start) & (picked < start + count)] - start
            start += count
            if len(index) == 0:
                continue
            if conv:
                found = image_patches(site, weight, part[index.to(part.device)])
                assert found is not None
            else:
                found = part.movedim(axis, 0)
                found = found.reshape(count, -1, found.shape[-1])[index.to(part.device)]
            rows.append(self._rows_of_each(found, share))
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
        most = -(-self.rows // pieces)
        if gradient is None:
            return rows[sample_rows(torch.ones(len(rows), device=rows.device), most, self.generator)[0]], None
        gradient = gradient.reshape(len(rows), -1)
        index, weight = sample_rows(gradient.square().sum(1), most, self.generator)
        return rows[index], gradient[index] * weight.sqrt()[:, None]

    def weighted_pairs(
        self, left: Tensor, right: Tensor, gradient: Tensor | None, pieces: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Some rows of some of the matrices of left [..., r, k] and right [..., k, c] with the gradients [..., r, c] of
        their products.

        Returns left [pairs, heads, r', k], right [pairs, heads, c, k], gradient [pairs, heads, r', c], times √(1/π);
        the last leading dimension counts as heads. pieces: batches that share ``self.pair_rows``.
        """
        lead = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        heads = lead[-1] if len(lead) >= 2 else 1

        def by_pair(x: Tensor) -> Tensor:
            return x.expand(*lead, *x.shape[-2:]).reshape(-1, heads, *x.shape[-2:])

        left, right = by_pair(left), by_pair(right)
        gradient = None if gradient is None else by_pair(gradient)
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


def _batch_axis(edge: Edge) -> int:
    """The dimension of an edge's value that grows with the number of images (images are its slowest part)."""
    shape = edge.value.meta.get("shape") or ()
    return next((i for i, size in enumerate(shape) if size is None), 0)
