"""Where the dimensions of a tensor are after operations that move values: reshapes, permutations, windows."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import fx

from quantlens.graph.graph import VIEWS, op_name

RESHAPES = {
    "aten.reshape.default",
    "aten.view.default",
    "aten._unsafe_view.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
}


def axes_of_last(sources: Collection[fx.Node], reader: fx.Node) -> tuple[int, ...]:
    """Dimensions (negative) of a source that lie whole within the last dimension of ``reader``.

    reader: one of ``sources``, or a value made of one by operations that move values alone; () where another operation
    lies between. Patch merging reads the channels four times over: they lie whole within [2 · 2 · C].

    >>> axes_of_last({patch_embedding}, tokens)  # [B, C, H, W] → flatten → transpose → [B, N, C]  # doctest: +SKIP
    (-3,)
    """
    moves: list[fx.Node] = []
    while reader not in sources:
        if op_name(reader) not in RESHAPES and (op_name(reader) not in VIEWS or len(reader.all_input_nodes) != 1):
            return ()
        moves.insert(0, reader)
        reader = reader.args[0]  # type: ignore[assignment]
    sizes = reader.meta["shape"][1:]
    if not moves:
        return (-1,)
    if None in sizes:
        return ()
    return tuple(axis for axis in range(-len(sizes), 0) if _lies_in_last(axis, sizes, moves))


def _lies_in_last(axis: int, sizes: Sequence[int], moves: Sequence[fx.Node], rows: int = 2) -> bool:
    """Proof by execution, on ``rows`` images: the numbers of a dimension's entries are moved, and the last dimension
    then holds all of them in order, alike for every image and token."""
    size = sizes[axis]
    numbers = torch.arange(size).view(-1, *[1] * (-axis - 1)).expand(rows, *sizes)
    for node in moves:
        if op_name(node) in RESHAPES:
            shape = node.meta["shape"][1:]
            missing = math.prod(shape) // math.gcd(math.prod(shape), numbers.numel())
            if missing > 1:  # the batch holds windows, which are put together here
                return _lies_in_last(axis, sizes, moves, rows * missing)
            numbers = numbers.reshape(-1, *shape)
        else:
            numbers = node.target(numbers, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    last = numbers.reshape(-1, numbers.shape[-1])
    run = int(last[0].unique_consecutive(return_counts=True)[1][0])
    expected = torch.arange(last.shape[1]) // run % size
    return size > 1 and last.shape[1] % (run * size) == 0 and bool((last == expected).all())
