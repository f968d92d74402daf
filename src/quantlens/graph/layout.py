"""Where the dimensions of a tensor are after operations that move values: reshapes, permutations, windows."""

import math
from collections.abc import Collection, Sequence
from fractions import Fraction
from typing import Any

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
    nodes = [reader]
    while nodes[0] not in sources:
        if op_name(nodes[0]) not in VIEWS:
            return ()
        nodes.insert(0, nodes[0].args[0])  # type: ignore[arg-type]
    if len(nodes) == 1:
        return (-1,)
    axes = range(1 - len(nodes[0].meta["shape"]), 0)
    return tuple(axis for axis in axes if _lies_in_last(axis, nodes))


def _lies_in_last(axis: int, nodes: Sequence[fx.Node]) -> bool:
    """Proof by execution: the numbers of a dimension's entries are moved, and the last dimension then holds all of them
    in order, alike for every image and token."""
    sizes = example_sizes(nodes)
    numbers = torch.arange(sizes[axis]).view(-1, *[1] * (-axis - 1)).expand(sizes)
    for node in nodes[1:]:
        numbers = moved(numbers, node)
    last = numbers.reshape(-1, numbers.shape[-1])
    run = int(last[0].unique_consecutive(return_counts=True)[1][0])
    expected = torch.arange(last.shape[1]) // run % sizes[axis]
    return sizes[axis] > 1 and last.shape[1] % (run * sizes[axis]) == 0 and bool((last == expected).all())


def example_sizes(nodes: Sequence[fx.Node]) -> list[int]:
    """Sizes for the first of ``nodes``, each of which moves the values of one before it: two images, or windows that
    make up so many."""
    shares = {nodes[0]: Fraction(1)}
    for node in nodes[1:]:
        source: Any = node.args[0]
        known = [math.prod(d or 1 for d in n.meta["shape"]) for n in (source, node)] if _reshapes(node) else (1, 1)
        shares[node] = shares[source] * Fraction(*known)
    images = 2 * math.lcm(*(share.denominator for share in shares.values()))
    return [images if d is None else d for d in nodes[0].meta["shape"]]


def moved(value: Any, node: fx.Node) -> Any:
    """A value after an operation that moves it, whatever its batch is."""
    if _reshapes(node):
        return value.reshape([-1 if d is None else d for d in node.meta["shape"]])
    return node.target(value, *node.args[1:], **node.kwargs)  # type: ignore[operator]


def _reshapes(node: fx.Node) -> bool:
    return op_name(node) in RESHAPES
