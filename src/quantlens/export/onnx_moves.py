"""ATen operations that move, pick, repeat or join values, and that make tensors, as ONNX operators."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from quantlens.errors import UnsupportedError
from quantlens.export.onnx_arithmetic import Writer
from quantlens.export.onnx_graph import Emitter
from quantlens.export.onnx_values import Size, described
from quantlens.graph.graph import argument, op_name

LAST = (1 << 31) - 1
"""The end of a slice that has none."""


# ---- views -----------------------------------------------------------------------------------------------------------


def _reshape(e: Emitter, node: fx.Node) -> str:
    return e.reshape(e.value(node), e.sizes(node))


def _permute(e: Emitter, node: fx.Node) -> str:
    """permute, transpose and their like: the order in which the dimensions of a small array end up."""
    rank = len(e.sizes(node))
    order = node.target(torch.empty(*range(rank), device="meta"), *node.args[1:]).shape  # type: ignore[operator]
    return e.op("Transpose", e.value(node), perm=list(order))


def _expand(e: Emitter, node: fx.Node) -> str:
    before, after = e.sizes(node.args[0]), e.sizes(node)
    return e.value(node) if before == after else e.op("Expand", e.value(node), e.shape(after))


def _same(e: Emitter, node: fx.Node) -> str:
    """What changes no value; unbind, split and chunk, too, which are written when a piece is read."""
    return e.value(node)


# ---- pieces ----------------------------------------------------------------------------------------------------------


def slice_of(e: Emitter, source: str, axis: int, start: int, stop: int, step: int = 1) -> str:
    return e.op("Slice", source, [start], [stop], [axis], [step])


def _slice(e: Emitter, node: fx.Node) -> str:
    axis, step = argument(node, "dim"), argument(node, "step")
    ends = []
    for name, default in (("start", 0), ("end", LAST)):
        given = argument(node, name)
        given = e.values.get(given, given) if isinstance(given, fx.Node) else given
        given = default if given is None else given
        ends.append(e.shape([given]) if isinstance(given, Size) else [min(given, LAST)])
    return e.op("Slice", e.value(node), *ends, [axis], [step])


def _narrow(e: Emitter, node: fx.Node) -> str:
    start = argument(node, "start")
    return slice_of(e, e.value(node), argument(node, "dim"), start, start + argument(node, "length"))


def _select(e: Emitter, node: fx.Node) -> str:
    return e.op("Gather", e.value(node), np.int64(argument(node, "index")), axis=argument(node, "dim"))


def _index_select(e: Emitter, node: fx.Node) -> str:
    index, axis = argument(node, "index"), argument(node, "dim")
    held = e.known(index)
    if held is None:
        return e.op("Gather", e.value(node), e.read(index), axis=axis)
    wanted = held.tolist()
    if wanted == list(range(wanted[0], wanted[0] + len(wanted))):
        return slice_of(e, e.value(node), axis, wanted[0], wanted[0] + len(wanted))
    return e.op("Gather", e.value(node), wanted, axis=axis)


def _getitem(e: Emitter, node: fx.Node) -> str:
    """A piece of unbind, split or chunk; one value of an operation that gives several."""
    parent, index = node.args
    source, axis = e.names[parent], argument(parent, "dim")  # type: ignore[index,arg-type]
    if isinstance(source, list):
        return source[index]  # type: ignore[index]
    if op_name(parent) == "aten.unbind.int":  # type: ignore[arg-type]
        return e.op("Gather", source, np.int64(index), axis=axis)
    pieces = [value.shape[axis] for value in e.values[parent]]  # type: ignore[index]
    start = sum(e.whole(node, *pieces[:index]))  # type: ignore[misc]
    return slice_of(e, source, axis, start, start + e.whole(node, pieces[index])[0])  # type: ignore[index]


def _flip(e: Emitter, node: fx.Node) -> str:
    value = e.value(node)
    for axis in argument(node, "dims"):
        value = slice_of(e, value, axis, -1, -LAST, -1)
    return value


def _roll(e: Emitter, node: fx.Node) -> str:
    value, dims, sizes = e.value(node), list(argument(node, "dims")), e.sizes(node)
    shifts = argument(node, "shifts")
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    flat = not dims
    if flat:
        sizes = (int(np.prod(e.whole(node, *sizes))),)
        value, dims = e.reshape(value, sizes), [0]
    for shift, axis in zip(shifts, dims, strict=True):
        size = e.whole(node, sizes[axis])[0]
        cut = (-shift) % size
        if cut:
            back, front = slice_of(e, value, axis, cut, size), slice_of(e, value, axis, 0, cut)
            value = e.op("Concat", back, front, axis=axis)
    return e.reshape(value, e.sizes(node)) if flat else value


# ---- several in one, one in several ----------------------------------------------------------------------------------


def _cat(e: Emitter, node: fx.Node) -> str:
    kind = e.values[node].kind
    parts = [n for n in node.args[0] if e.sizes(n) != (0,)]  # type: ignore[union-attr]
    return e.op("Concat", *(e.read(part, kind) for part in parts), axis=argument(node, "dim"))


def _stack(e: Emitter, node: fx.Node) -> str:
    kind, axis = e.values[node].kind, e.axis(node, argument(node, "dim"))
    parts = [e.op("Unsqueeze", e.read(part, kind), [axis]) for part in node.args[0]]  # type: ignore[union-attr]
    return e.op("Concat", *parts, axis=axis)


def _repeat(e: Emitter, node: fx.Node) -> str:
    before, after = e.sizes(node.args[0]), e.sizes(node)
    value = e.value(node)
    if len(before) < len(after):
        before = (1,) * (len(after) - len(before)) + before
        value = e.reshape(value, before)
    times = [_times(old, new) for old, new in zip(before, after, strict=True)]
    return e.op("Tile", value, e.shape(times))


def _times(old: Any, new: Any) -> Any:
    """How often a size is in another."""
    if isinstance(new, Size):
        return new.per_image // old.per_image if isinstance(old, Size) else Size(new.per_image // old, new.fixed // old)
    return new // max(old, 1)


def _repeat_interleave(e: Emitter, node: fx.Node) -> str:
    """Each value so many times: an axis of its own beside it, made wider."""
    dim = argument(node, "dim")
    if dim is None:
        raise UnsupportedError(f"export cannot write {described(node)} over all dimensions")
    axis, times, sizes = e.axis(node, dim), int(argument(node, "repeats")), e.sizes(node.args[0])
    wide = e.op(
        "Expand",
        e.op("Unsqueeze", e.value(node), [axis + 1]),
        [1] * (axis + 1) + [times] + [1] * (len(sizes) - axis - 1),
    )
    return e.reshape(wide, e.sizes(node))


def _picked_in(e: Emitter, node: fx.Node) -> str:
    """select_scatter and slice_scatter: a value with a piece replaced."""
    dim, sizes = e.axis(node, argument(node, "dim")), e.sizes(node)
    size = e.whole(node, sizes[dim])[0]
    kind, value, piece = e.values[node].kind, e.value(node), e.read(node.args[1], e.values[node].kind)
    if "select" in op_name(node):
        start = argument(node, "index") % size
        stop, piece = start + 1, e.op("Unsqueeze", piece, [dim])
    else:
        start, stop, step = slice(argument(node, "start"), argument(node, "end"), argument(node, "step")).indices(size)
        if step != 1:
            raise UnsupportedError(f"export cannot write {described(node)} in steps")
    value = e.cast(value, e.values[node.args[0]].kind, kind)  # type: ignore[index]
    parts = [slice_of(e, value, dim, 0, start)] if start > 0 else []
    parts += [piece, *([slice_of(e, value, dim, stop, size)] if stop < size else [])]
    return e.op("Concat", *parts, axis=dim)


# ---- by indices ------------------------------------------------------------------------------------------------------


def _gather(e: Emitter, node: fx.Node) -> str:
    return e.op("GatherElements", e.value(node), e.read(argument(node, "index"), "int"), axis=argument(node, "dim"))


def _scatter(e: Emitter, node: fx.Node) -> str:
    index, kind = argument(node, "index"), e.values[node].kind
    if "value" in op_name(node):
        source = e.op("Expand", e.read(argument(node, "value"), kind), e.shape(e.sizes(index)))
    elif e.sizes(argument(node, "src")) != e.sizes(index):
        raise UnsupportedError(f"export cannot write {described(node)} of a part of its values")
    else:
        source = e.read(argument(node, "src"), kind)
    how = {"reduction": "add"} if "add" in op_name(node) else {}
    return e.op("ScatterElements", e.value(node), e.read(index, "int"), source, axis=argument(node, "dim"), **how)


def _index(e: Emitter, node: fx.Node) -> str:
    """``x[:, i, j]`` with indices of any shape, or masks that no input changes."""
    given: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    picked = []
    for axis, index in enumerate(given):
        if index is None:
            continue
        held = e.known(index)
        if (e.values[index].kind if held is None else held.dtype) in ("bool", torch.bool):
            if held is None or held.dim() != 1:
                raise UnsupportedError(f"export cannot write {described(node)} by a mask")
            held = held.nonzero()[:, 0]
        picked.append((axis, index if held is None else held))
    if len(picked) == 1:
        axis, index = picked[0]
        return e.op("Gather", e.value(node), index if isinstance(index, Tensor) else e.read(index, "int"), axis=axis)
    axes = [axis for axis, _ in picked]
    rank, sizes = len(e.sizes(node.args[0])), e.sizes(node)
    rest = [axis for axis in range(rank) if axis not in axes]
    wide = len(sizes) - len(rest)  # dimensions of the indices together
    first = axes[0] if axes == list(range(axes[0], axes[0] + len(axes))) else 0  # where torch puts them
    bounds = e.shape(sizes[first : first + wide])
    columns = []
    for _, index in picked:
        name = index if isinstance(index, Tensor) else e.read(index, "int")
        columns.append(e.op("Unsqueeze", e.op("Expand", name, bounds), [-1]))
    value = e.op("Transpose", e.value(node), perm=axes + rest)
    found = e.op("GatherND", value, e.op("Concat", *columns, axis=-1))
    order = list(range(wide, wide + first)) + list(range(wide)) + list(range(wide + first, len(sizes)))
    return e.op("Transpose", found, perm=order) if first else found


def _index_put(e: Emitter, node: fx.Node) -> str:
    """``x[mask] = number``, with a mask of x's shape."""
    indices, kind = argument(node, "indices"), e.values[node].kind
    whole = len(indices) == 1 and e.values[indices[0]] == ("bool", e.sizes(node))
    if not whole or e.sizes(argument(node, "values")) not in ((), (1,)) or argument(node, "accumulate"):
        raise UnsupportedError(f"export cannot write {described(node)} by indices")
    return e.op("Where", e.read(indices[0]), e.read(argument(node, "values"), kind), e.operand(node, 0, kind))


def _embedding(e: Emitter, node: fx.Node) -> str:
    return e.op("Gather", e.read(argument(node, "weight")), e.read(argument(node, "indices"), "int"), axis=0)


def _one_hot(e: Emitter, node: fx.Node) -> str:
    values = e.op("Unsqueeze", e.operand(node, 0, "int"), [-1])
    return e.cast(e.op("Equal", values, np.arange(e.sizes(node)[-1])), "bool", "int")


def _topk(e: Emitter, node: fx.Node) -> list[str]:
    """topk and sort: values and where they were."""
    dim, largest = e.axis(node.args[0], argument(node, "dim")), argument(node, "largest", argument(node, "descending"))
    count = argument(node, "k", e.sizes(node.args[0])[dim])
    return e.ops("TopK", e.operand(node, 0, "float"), e.shape([count]), outs=2, axis=dim, largest=int(bool(largest)))


def _argsort(e: Emitter, node: fx.Node) -> str:
    return _topk(e, node)[1]


def _unfold(e: Emitter, node: fx.Node) -> str:
    """Windows of an axis, with an axis of their own at the end."""
    axis, rank = e.axis(node.args[0], argument(node, "dimension")), len(e.sizes(node))
    starts = np.arange(e.sizes(node)[axis])[:, None] * argument(node, "step")
    windows = e.op("Gather", e.value(node), starts + np.arange(argument(node, "size")), axis=axis)
    order = [d for d in range(rank) if d != axis + 1] + [axis + 1]
    return e.op("Transpose", windows, perm=order)


def _triangle(e: Emitter, node: fx.Node) -> str:
    return e.op("Trilu", e.value(node), np.int64(argument(node, "diagonal")), upper=int("triu" in op_name(node)))


# ---- tensors that are made -------------------------------------------------------------------------------------------


def _filled(fill: Any = None) -> Writer:
    """A tensor of one number, of the sizes of the batch. fill: the number; None for the node's own."""

    def write(e: Emitter, node: fx.Node) -> str:
        number = argument(node, "fill_value", argument(node, "value")) if fill is None else fill
        return e.op("Expand", e.read(number, e.values[node].kind), e.shape(e.sizes(node)))

    return write


def _arange(e: Emitter, node: fx.Node) -> str:
    kind = e.values[node].kind
    start, step = argument(node, "start", 0), argument(node, "step", 1)
    return e.op("Range", *(e.read(number, kind) for number in (start, argument(node, "end"), step)))


def _copied(e: Emitter, node: fx.Node) -> str:
    """What is copied into another tensor, in its kind and sizes."""
    value = e.read(node.args[1], e.values[node].kind)
    return value if e.sizes(node.args[1]) == e.sizes(node) else e.op("Expand", value, e.shape(e.sizes(node)))


MADE = {"zeros": 0, "ones": 1, "full": None, "empty": 0}
"""Operations that fill a tensor, and with what."""

MOVES: dict[str, Writer] = {
    **dict.fromkeys(
        (
            *(
                f"aten.{name}.default"
                for name in ("reshape", "view", "_unsafe_view", "unsqueeze", "view_as", "reshape_as")
            ),
            *(f"aten.squeeze.{kind}" for kind in ("dim", "dims", "default")),
            "aten.flatten.using_ints",
            "aten.unflatten.int",
        ),
        _reshape,
    ),
    **dict.fromkeys(
        (
            *(f"aten.{name}.default" for name in ("permute", "t", "numpy_T", "swapaxes", "swapdims")),
            *(f"aten.{name}.int" for name in ("transpose", "movedim", "moveaxis")),
            "aten.movedim.intlist",
        ),
        _permute,
    ),
    **{f"aten.{name}.default": _expand for name in ("expand", "expand_as", "broadcast_to")},
    **{
        f"aten.{name}.default": _same
        for name in ("clone", "contiguous", "dropout", "alias", "detach", "lift_fresh_copy")
    },
    **dict.fromkeys(
        (
            "aten.unbind.int",
            *(f"aten.{name}.Tensor" for name in ("split", "unsafe_split")),
            *(f"aten.{name}.default" for name in ("split_with_sizes", "chunk", "unsafe_chunk")),
            *(f"aten.tensor_split.{kind}" for kind in ("sections", "indices")),
            "aten.split.sizes",
        ),
        _same,
    ),
    "<built-in function getitem>": _getitem,
    "aten.select.int": _select,
    "aten.slice.Tensor": _slice,
    "aten.narrow.default": _narrow,
    "aten.index_select.default": _index_select,
    "aten.flip.default": _flip,
    "aten.roll.default": _roll,
    "aten.cat.default": _cat,
    "aten.concat.default": _cat,
    "aten.stack.default": _stack,
    "aten.repeat.default": _repeat,
    "aten.tile.default": _repeat,
    "aten.repeat_interleave.self_int": _repeat_interleave,
    "aten.select_scatter.default": _picked_in,
    "aten.slice_scatter.default": _picked_in,
    "aten.gather.default": _gather,
    **{f"aten.scatter.{kind}": _scatter for kind in ("src", "value")},
    "aten.scatter_add.default": _scatter,
    "aten.index.Tensor": _index,
    "aten.index_put.default": _index_put,
    "aten.embedding.default": _embedding,
    "aten.one_hot.default": _one_hot,
    "aten.topk.default": _topk,
    **{f"aten.sort.{kind}": _topk for kind in ("default", "stable")},
    **{f"aten.argsort.{kind}": _argsort for kind in ("default", "stable")},
    "aten.unfold.default": _unfold,
    "aten.tril.default": _triangle,
    "aten.triu.default": _triangle,
    **{f"aten.{name}.default": _filled(fill) for name, fill in MADE.items()},
    **{f"aten.new_{name}.default": _filled(fill) for name, fill in MADE.items()},
    **{f"aten.{name}_like.default": _filled(fill) for name, fill in MADE.items()},
    "aten.empty.memory_format": _filled(0),
    **{f"aten.fill.{kind}": _filled() for kind in ("Scalar", "Tensor")},
    "aten.scalar_tensor.default": lambda e, node: e.read(node.args[0], e.values[node].kind),
    **{f"aten.arange.{kind}": _arange for kind in ("default", "start", "start_step")},
    "aten.copy.default": _copied,
}
"""ATen operation -> how it is written."""
