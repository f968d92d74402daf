"""Where a dimension is after operations that move values, against running them on the dimension's indices."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import fx

from quantlens.graph.layout import axes_of_last

aten = torch.ops.aten
SIZES = [2, 3, 4, 6]
PARTS = {aten.roll.default, aten.slice.Tensor, aten.split.Tensor, aten.select.int}
"""Take a part or another order, which a later move may undo: that is not looked for."""


def _draw_move(draw, shape):
    """(operation, arguments) for a tensor whose first dimension, the batch, stays first or is merged with others."""
    rank = len(shape)
    kinds = ["permute", "transpose", "flatten", "unflatten", "unsqueeze", "roll", "slice", "select", "clone", "split"]
    kind = draw(st.sampled_from(kinds))
    axis = draw(st.integers(1, rank - 1)) if rank > 1 else 0
    if kind == "permute":
        return aten.permute.default, ([0, *draw(st.permutations(range(1, rank)))],)
    if kind == "transpose" and rank > 2:
        return aten.transpose.int, (axis, draw(st.integers(1, rank - 1)) - rank)
    if kind == "flatten" and rank > 2:
        start = draw(st.integers(0, rank - 2))
        return aten.flatten.using_ints, (start, draw(st.integers(start + 1, rank - 1)) if start else 1)
    if kind == "unflatten" and shape[0] % 2 == 0 and draw(st.booleans()):
        return aten.unflatten.int, (0, [shape[0] // 2, 2])
    if kind == "unflatten" and axis and shape[axis] in (4, 6, 8, 12, 24):
        return aten.unflatten.int, (axis, [2, shape[axis] // 2])
    if kind == "unsqueeze":
        return aten.unsqueeze.default, (axis or 1,)
    if kind == "roll" and axis:
        return aten.roll.default, ([1], [axis])
    if kind == "slice" and axis and shape[axis] > 2:
        return aten.slice.Tensor, (axis, 1, shape[axis])
    if kind == "split" and axis and shape[axis] > 2:
        return aten.split.Tensor, (2, axis)
    if kind == "select" and rank > 2:
        return aten.select.int, (axis, 0)
    return aten.clone.default, ()


def _runs_over(rows, size):
    """Whether every row runs over 0 … size − 1 in order, whatever dimensions lie outside or inside of it."""
    places = torch.arange(rows.shape[1])
    inner = [n for n in range(1, rows.shape[1] + 1) if rows.shape[1] % (n * size) == 0]
    return any(bool((rows == places // n % size).all()) for n in inner)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_last_dimension_is_where_its_indices_are(data):
    shape = [8, *data.draw(st.lists(st.sampled_from(SIZES), min_size=2, max_size=3))]
    graph = fx.Graph()
    source = node = graph.placeholder("x")
    value = torch.zeros(shape)
    source.meta["shape"] = (None, *shape[1:])
    moves = []
    for _ in range(data.draw(st.integers(0, 4))):
        operation, arguments = _draw_move(data.draw, value.shape)
        node = graph.call_function(operation, (node, *arguments))
        value = operation(value, *arguments)
        moves.append((operation, arguments))
        if isinstance(value, list):  # what a split gives
            node = graph.call_function(operator.getitem, (node, len(value) - 1))
            value = value[-1]
        node.meta["shape"] = (None, *value.shape[1:])
    found = axes_of_last({source}, node)
    whole = []
    for axis in range(1, len(shape)):
        index = torch.arange(shape[axis]).view([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)
        for operation, arguments in moves:
            index = operation(index, *arguments)
            index = index[-1] if isinstance(index, list) else index
        rows = index.reshape(-1, index.shape[-1])
        if _runs_over(rows, shape[axis]):
            whole.append(axis - len(shape))
    assert set(found) <= set(whole), (shape, moves)
    if not any(operation in PARTS or arguments[:1] == (0,) for operation, arguments in moves):  # 0: the batch is split
        assert set(found) == set(whole), (shape, moves)


def test_other_operations_lie_between():
    graph = fx.Graph()
    source = graph.placeholder("x")
    node = graph.call_function(aten.relu.default, (source,))
    source.meta["shape"] = node.meta["shape"] = (None, 4)
    assert axes_of_last({source}, node) == ()
    assert axes_of_last({source, node}, node) == (-1,)


def test_a_dimension_that_is_split_and_joined_again():
    graph = fx.Graph()
    source = graph.placeholder("x")
    split = graph.call_function(aten.unflatten.int, (source, 1, [2, 2]))
    joined = graph.call_function(aten.flatten.using_ints, (split, 1, 3))
    turned = graph.call_function(aten.transpose.int, (split, 1, 2))
    mixed = graph.call_function(aten.flatten.using_ints, (turned, 1, 3))
    for node, shape in ((source, (4, 3)), (split, (2, 2, 3)), (joined, (12,)), (turned, (2, 2, 3)), (mixed, (12,))):
        node.meta["shape"] = (None, *shape)
    assert axes_of_last({source}, joined) == (-2, -1)
    assert axes_of_last({source}, mixed) == (-1,)


def test_a_part_of_a_dimension_is_not_the_dimension():
    graph = fx.Graph()
    source = graph.placeholder("x")
    rolled = graph.call_function(aten.roll.default, (source, [1], [1]))
    half = graph.call_function(aten.slice.Tensor, (source, 1, 0, 2))
    for node, size in ((source, 4), (rolled, 4), (half, 2)):
        node.meta["shape"] = (None, size)
    assert axes_of_last({source}, rolled) == axes_of_last({source}, half) == ()


@pytest.mark.parametrize(("moves", "expected"), [("BCHW to tokens", -3), ("windows", -1), ("patch merging", -1)])
def test_tokens_of_a_convolution_and_windows(moves, expected):
    graph = fx.Graph()
    source = node = graph.placeholder("x")
    source.meta["shape"] = (None, 8, 4, 4) if expected == -3 else (None, 4, 4, 8)
    steps = (
        [(aten.flatten.using_ints, (2, 3), (None, 8, 16)), (aten.transpose.int, (1, 2), (None, 16, 8))]
        if expected == -3
        else [
            (aten.view.default, ([-1, 2, 2, 2, 2, 8],), (None, 2, 2, 2, 2, 8)),
            (aten.permute.default, ([0, 1, 3, 2, 4, 5],), (None, 2, 2, 2, 2, 8)),
            (aten.reshape.default, ([-1, 4, 8],), (None, 4, 8)),
        ]
    )
    if moves == "patch merging":
        steps = [steps[0], (aten.permute.default, ([0, 1, 3, 4, 2, 5],), (None, 2, 2, 2, 2, 8))]
        steps += [(aten.flatten.using_ints, (3, -1), (None, 2, 2, 32))]
    for operation, arguments, shape in steps:
        node = graph.call_function(operation, (node, *arguments))
        node.meta["shape"] = shape
    assert axes_of_last({source}, node) == (expected,)
