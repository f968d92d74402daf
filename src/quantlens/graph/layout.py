"""Where the dimensions of a tensor are after operations that move values: reshapes, permutations, windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from quantlens.graph.graph import op_name


@dataclass(frozen=True)
class Piece:
    """A dimension of the source, or a factor of it. size: None for the batch. stride: how far apart in that dimension
    its entries are; None where they are only some of them, or in another order."""

    axis: int
    size: int | None
    stride: int | None = 1


MIXED = Piece(-1, None, None)
"""As many entries as wanted, of which only this is known: they come from the batch, or from several dimensions."""

Layout = tuple[tuple[Piece, ...], ...]
"""For every dimension of a tensor, outermost first, what of the source it runs over."""


def axes_of_last(sources: Collection[fx.Node], reader: fx.Node) -> tuple[int, ...]:
    """Dimensions (negative) of a source that lie whole within the last dimension of ``reader``, outermost first.

    reader: one of ``sources``, or a value made of one by operations that move values alone; () where another operation
    lies between. Patch merging reads the channels four times over: they lie whole within [2 · 2 · C].

    >>> axes_of_last({patch_embedding}, tokens)  # [B, C, H, W] → flatten → transpose → [B, N, C]  # doctest: +SKIP
    (-3,)
    """
    moves: list[fx.Node] = []
    while reader not in sources:
        if op_name(reader) not in MOVES:
            return ()
        moves.insert(0, reader)
        reader = reader.args[0]  # type: ignore[assignment]
    shape = tuple(reader.meta["shape"])
    layout: Layout | None = tuple((Piece(axis, size),) for axis, size in enumerate(shape))
    for node in moves:
        layout = MOVES[op_name(node)](layout, node)
        if layout is None:
            return ()
    if not layout:
        return ()
    return tuple(p.axis - len(shape) for p in layout[-1] if p.stride == 1 and p.size == shape[p.axis])


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Factors of a dimension that lie side by side as they did in it are one piece again."""
    joined: list[Piece] = []
    for piece in pieces:
        outer = joined[-1] if joined else MIXED
        inner = piece.stride * piece.size if piece.stride and piece.size else None
        if outer.axis == piece.axis and outer.size and inner and outer.stride == inner:
            piece = Piece(piece.axis, outer.size * (piece.size or 1), piece.stride)
            joined.pop()
        joined.append(piece)
    return joined


def _regroup(layout: Layout, node: fx.Node) -> Layout | None:
    """The dimensions of a reshape take the pieces from the innermost on; what is left over is the outermost one."""
    pieces = _joined(piece for dim in layout for piece in dim if piece.size != 1)
    grouped: list[tuple[Piece, ...]] = []
    for size in reversed(node.meta["shape"][1:]):
        if size is None:
            return None
        dim: list[Piece] = []
        while size > 1:
            piece = pieces.pop() if pieces else MIXED
            common = math.gcd(size, piece.size) if piece.size else size
            if piece.size is None or common not in (size, piece.size):  # what lies further out is mixed from here on
                pieces, piece = [MIXED], Piece(-1, size, None)
            elif common < piece.size:
                pieces.append(Piece(piece.axis, piece.size // common, piece.stride and piece.stride * common))
                piece = Piece(piece.axis, common, piece.stride)
            dim.insert(0, piece)
            size //= piece.size
        grouped.insert(0, tuple(dim))
    return (tuple(pieces), *grouped)


def _permute(layout: Layout, node: fx.Node) -> Layout:
    return tuple(layout[axis] for axis in node.args[1])  # type: ignore[union-attr]


def _transpose(layout: Layout, node: fx.Node) -> Layout:
    turned = list(layout)
    a, b = node.args[1:3]
    turned[a], turned[b] = layout[b], layout[a]  # type: ignore[index, call-overload]
    return tuple(turned)


def _unsqueeze(layout: Layout, node: fx.Node) -> Layout:
    axis = node.args[1] % (len(layout) + 1)  # type: ignore[operator]
    return (*layout[:axis], (), *layout[axis:])


def _without(layout: Layout, node: fx.Node) -> Layout:
    """One index of a dimension is taken (select, unbind), or one of size 1 goes (squeeze)."""
    axis = (node.args[1] if len(node.args) > 1 else 0) % len(layout)  # type: ignore[operator]
    return (*layout[:axis], *layout[axis + 1 :])


def _cut(dim: tuple[Piece, ...], size: int | None) -> tuple[Piece, ...]:
    """A dimension of which ``size`` entries are left, in any order."""
    return (Piece(dim[0].axis if dim else -1, size, None),)


def _partial(position: int) -> Callable[[Layout, fx.Node], Layout]:
    """A part of a dimension, or its entries in another order; the dimension is argument ``position``."""

    def change(layout: Layout, node: fx.Node) -> Layout:
        given: Any = node.args[position] if len(node.args) > position else 0
        axes = {axis % len(layout) for axis in (given if isinstance(given, list | tuple) else [given])}
        shape = node.meta.get("shape") or (None,) * len(layout)
        return tuple(_cut(dim, shape[axis]) if axis in axes else dim for axis, dim in enumerate(layout))

    return change


def _expand(layout: Layout, node: fx.Node) -> Layout:
    return (*((),) * (len(node.meta["shape"]) - len(layout)), *layout)


def _same(layout: Layout, node: fx.Node) -> Layout:
    return layout


def _item(layout: Layout, node: fx.Node) -> Layout:
    """One of the tensors of a split, whose size is known now."""
    cut = [len(dim) == 1 and dim[0].size is None and dim[0].stride is None for dim in layout]
    sizes = node.meta["shape"]
    return tuple(_cut(d, size) if c else d for d, c, size in zip(layout, cut, sizes, strict=True))


MOVES: dict[str, Callable[[Any, fx.Node], Layout | None]] = {
    **dict.fromkeys(
        (
            "aten.reshape.default",
            "aten.view.default",
            "aten._unsafe_view.default",
            "aten.flatten.using_ints",
            "aten.unflatten.int",
        ),
        _regroup,
    ),
    "aten.permute.default": _permute,
    "aten.transpose.int": _transpose,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.squeeze.dim": _without,
    "aten.select.int": _without,
    "aten.unbind.int": _without,
    "aten.slice.Tensor": _partial(1),
    "aten.split.Tensor": _partial(2),
    "aten.split_with_sizes.default": _partial(2),
    "aten.chunk.default": _partial(2),
    "aten.roll.default": _partial(2),
    "aten.expand.default": _expand,
    "aten.clone.default": _same,
    "aten.contiguous.default": _same,
    "<built-in function getitem>": _item,
}
"""Operation -> the layout of its result."""
