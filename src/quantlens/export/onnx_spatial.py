"""ATen operations on rows and columns: pooling, resizing, padding, sampling, patches, as ONNX operators.

Where runtimes differ in their reading of an operator's settings, it is written in ones that leave no choice: pads are
explicit, resizing is a product with the matrix that torch itself resizes by.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from quantlens.errors import UnsupportedError
from quantlens.export.onnx_arithmetic import Writer
from quantlens.export.onnx_graph import Emitter
from quantlens.export.onnx_moves import slice_of
from quantlens.export.onnx_values import described
from quantlens.graph.graph import argument, op_name

aten = torch.ops.aten


def _each(value: Any, count: int, default: Any = None) -> list[Any]:
    """A setting for every one of the last dimensions."""
    value = default if value is None or value == [] else value
    return list(value) * (count // len(value)) if isinstance(value, list | tuple) else [value] * count


# ---- pooling ---------------------------------------------------------------------------------------------------------


def _pool(e: Emitter, node: fx.Node) -> Any:
    """Largest or mean value of windows. Windows that hang over the end (ceil_mode) have explicit pads; a mean that
    divides by another number than a window's places is scaled by torch's own factors."""
    largest, rank = "max" in op_name(node), 3 if "3d" in op_name(node) else 2 if "2d" in op_name(node) else 1
    before = e.whole(node, *e.sizes(node.args[0])[-rank:])
    value = e.values[node]
    after = (value[0] if isinstance(value, list) else value).shape[-rank:]
    kernel = _each(argument(node, "kernel_size"), rank)
    stride, pad = _each(argument(node, "stride"), rank, kernel), _each(argument(node, "padding"), rank)
    dilation = _each(argument(node, "dilation", 1), rank)
    rows = zip(after, stride, dilation, kernel, before, pad, strict=True)
    end = [max(0, (n - 1) * s + d * (k - 1) + 1 - size - p) for n, s, d, k, size, p in rows]
    settings: dict[str, Any] = {"kernel_shape": kernel, "strides": stride, "pads": pad + end}
    source = e.value(node)
    whole = len(e.sizes(node.args[0])) == rank + 2
    source = source if whole else e.op("Unsqueeze", source, [0])
    if largest:
        found = e.op("MaxPool", source, dilations=dilation, **settings)
    else:
        if any(pad + end):  # OpenVINO adds after the mean what is added before, also for the zeros around
            source = e.apart(source)
        found = e.op("AveragePool", source, count_include_pad=1, **settings)
        ones = torch.ones(1, 1, *before)
        plain = F.pad(ones, [n for p in zip(pad[::-1], end[::-1], strict=True) for n in p])
        window = (torch.nn.functional.avg_pool1d, torch.nn.functional.avg_pool2d, torch.nn.functional.avg_pool3d)[
            rank - 1
        ]
        factor = node.target(ones, *node.args[1:], **node.kwargs) / window(plain, kernel, stride)  # type: ignore[operator]
        if not bool((factor == 1).all()):
            found = e.op("Mul", found, factor)
    found = found if whole else e.op("Squeeze", found, [0])
    return [found] if isinstance(value, list) else found


def _adaptive_pool(e: Emitter, node: fx.Node) -> Any:
    """Windows of equal sizes where the sizes divide; else products with means, or one window after the other."""
    largest, rank = "max" in op_name(node), 3 if "3d" in op_name(node) else 2 if "2d" in op_name(node) else 1
    before = e.whole(node, *e.sizes(node.args[0])[-rank:])
    value = e.values[node]
    after = (value[0] if isinstance(value, list) else value).shape[-rank:]
    source, sizes = e.value(node), list(e.sizes(node.args[0]))
    kind = "ReduceMax" if largest else "ReduceMean"
    if set(after) == {1}:
        found = e.op(kind, source, list(range(-rank, 0)), keepdims=1)
    elif not any(b % a for b, a in zip(before, after, strict=True)) and len(sizes) == rank + 2:
        kernel = [b // a for b, a in zip(before, after, strict=True)]
        found = e.op("MaxPool" if largest else "AveragePool", source, kernel_shape=kernel, strides=kernel)
    else:
        found = source
        for axis, (old, new) in enumerate(zip(before, after, strict=True), start=-rank):
            edges = [(i * old // new, -(-(i + 1) * old // new)) for i in range(new)]
            windows = [e.op(kind, slice_of(e, found, axis, a, b), [axis], keepdims=1) for a, b in edges]
            found = e.op("Concat", *windows, axis=axis)
    return [found] if isinstance(value, list) else found


# ---- resizing --------------------------------------------------------------------------------------------------------

RESIZED = {
    "upsample_linear1d": aten.upsample_linear1d.default,
    "upsample_bilinear2d": aten.upsample_bilinear2d.default,
    "upsample_bicubic2d": aten.upsample_bicubic2d.default,
    "_upsample_bilinear2d_aa": aten._upsample_bilinear2d_aa.default,
    "_upsample_bicubic2d_aa": aten._upsample_bicubic2d_aa.default,
    "upsample_nearest1d": aten.upsample_nearest1d.default,
    "upsample_nearest2d": aten.upsample_nearest2d.default,
    "_upsample_nearest_exact1d": aten._upsample_nearest_exact1d.default,
    "_upsample_nearest_exact2d": aten._upsample_nearest_exact2d.default,
}
"""Resizings, each a product along every axis, and the overload that takes sizes and factors both."""


def _resize(e: Emitter, node: fx.Node) -> str:
    name = op_name(node).split(".")[1]
    rank, value = int(name.partition("d")[0][-1]) if name[-1] == "d" else 2, e.value(node)
    before, after = e.whole(node, *e.sizes(node.args[0])[-rank:]), e.sizes(node)[-rank:]
    factors = _each(argument(node, "scale_factors") or _factors(node, rank), rank)
    for axis in range(rank):
        if before[axis] == after[axis] and factors[axis] in (None, 1):
            continue
        matrix = _weights(RESIZED[name], node, before[axis], after[axis], factors[axis], rank)
        if "nearest" in name:
            value = e.op("Gather", value, matrix.argmax(1), axis=2 + axis)
        elif axis == rank - 1:
            value = e.op("MatMul", value, matrix.T.contiguous())
        else:
            value = e.op("MatMul", matrix, value)
    # OpenVINO takes scales of channels that come next for scales of the product's last dimension
    return value if "nearest" in name else e.apart(value)


def _factors(node: fx.Node, rank: int) -> Any:
    """Factors of the overload that has one argument for each."""
    return [argument(node, "scales")] if rank == 1 else [argument(node, "scales_h"), argument(node, "scales_w")]


def _weights(operation: Any, node: fx.Node, old: int, new: int, factor: Any, rank: int) -> Tensor:
    """The matrix [new, old] that an axis is resized by: what torch makes of the columns of the identity."""
    beside = [2] * (rank - 1)  # not 1: with it the antialiased kernels take a layout for another
    columns = torch.eye(old).reshape(1, old, old, *[1] * (rank - 1)).expand(1, old, old, *beside).contiguous()
    aligned = [] if "nearest" in op_name(node) else [bool(argument(node, "align_corners"))]
    resized = operation(columns, [new, *beside], *aligned, factor, *[None] * (rank - 1))
    return resized.reshape(old, new, -1)[..., 0].T.contiguous()


def _grid_sample(e: Emitter, node: fx.Node) -> str:
    modes = (argument(node, "interpolation_mode"), argument(node, "padding_mode"))
    return e.op(
        "GridSample",
        e.value(node),
        e.value(node, 1),
        mode=("linear", "nearest", "cubic")[modes[0]],
        padding_mode=("zeros", "border", "reflection")[modes[1]],
        align_corners=int(argument(node, "align_corners")),
    )


# ---- padding ---------------------------------------------------------------------------------------------------------

PADDINGS = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _pad(e: Emitter, node: fx.Node) -> str:
    """Padding of the last dimensions; a negative one cuts off."""
    name, pads = op_name(node), list(argument(node, "pad", argument(node, "padding")))
    mode = argument(node, "mode", next((m for m in PADDINGS if m[:6] in name), "constant"))
    value, rank = e.value(node), len(e.sizes(node))
    before, after = pads[-2::-2], pads[::-2]
    skipped = rank - len(before)
    for axis, (start, stop) in enumerate(zip(before, after, strict=True), start=skipped):
        if start < 0 or stop < 0:
            value = slice_of(e, value, axis, max(0, -start), min(stop, 0) or (1 << 31) - 1)
    grown = [[0] * skipped + [max(0, p) for p in part] for part in (before, after)]
    if not any(map(any, grown)):
        return value
    if mode == "circular":
        for axis in range(skipped, rank):
            value = _wrapped(e, node, value, axis, grown[0][axis], grown[1][axis])
        return value
    fill = [e.read(argument(node, "value") or 0, e.values[node].kind)] if mode == "constant" else []
    how = {} if mode == "constant" else {"mode": PADDINGS[mode]}
    return e.op("Pad", value, grown[0] + grown[1], *fill, **how)


def _wrapped(e: Emitter, node: fx.Node, value: str, axis: int, start: int, stop: int) -> str:
    size = e.whole(node, e.sizes(node.args[0])[axis])[0]
    parts = [slice_of(e, value, axis, size - start, size)] if start else []
    parts += [value, *([slice_of(e, value, axis, 0, stop)] if stop else [])]
    return e.op("Concat", *parts, axis=axis) if len(parts) > 1 else value


# ---- patches ---------------------------------------------------------------------------------------------------------


def _patches(e: Emitter, node: fx.Node) -> str:
    """im2col: a convolution that takes every place of a window into a channel of its own; col2im its transpose."""
    back = "col2im" in op_name(node)
    kernel = list(argument(node, "kernel_size"))
    settings: dict[str, Any] = {}
    for own, name in (("strides", "stride"), ("dilations", "dilation"), ("pads", "padding")):
        settings[own] = _each(argument(node, name), 4 if own == "pads" else 2)
    batch, channels = e.sizes(node)[0], e.sizes(node if back else node.args[0])[1]
    places = math.prod(kernel)
    one_hot = torch.eye(places).reshape(places, 1, *kernel).repeat(channels, 1, 1, 1)
    if not back:
        found = e.op("Conv", e.value(node), one_hot, group=channels, kernel_shape=kernel, **settings)
        return e.reshape(found, e.sizes(node))
    size = list(argument(node, "output_size"))
    rows = zip(size, kernel, settings["dilations"], settings["pads"][:2], settings["strides"], strict=True)
    grid, rest = zip(*(divmod(n + 2 * p - d * (k - 1) - 1, s) for n, k, d, p, s in rows), strict=True)
    source = e.reshape(e.value(node), [batch, channels * places, *(g + 1 for g in grid)])
    settings["output_padding"] = list(rest)
    return e.op("ConvTranspose", source, one_hot, group=channels, kernel_shape=kernel, **settings)


def _pixel_shuffle(e: Emitter, node: fx.Node) -> str:
    """Channels into places (pixel_shuffle) and places into channels."""
    back, sizes = "unshuffle" in op_name(node), e.sizes(node)
    if len(sizes) != 4:
        raise UnsupportedError(f"export cannot write {described(node)} of {len(sizes)} dimensions")
    factor = argument(node, "downscale_factor" if back else "upscale_factor")
    batch, width, rows, columns = sizes
    if not back:
        split = e.reshape(e.value(node), [batch, width, factor, factor, rows // factor, columns // factor])
        return e.reshape(e.op("Transpose", split, perm=[0, 1, 4, 2, 5, 3]), sizes)
    split = e.reshape(e.value(node), [batch, width // factor**2, rows, factor, columns, factor])
    return e.reshape(e.op("Transpose", split, perm=[0, 1, 3, 5, 2, 4]), sizes)


def _channel_shuffle(e: Emitter, node: fx.Node) -> str:
    width, groups = e.sizes(node)[1], argument(node, "groups")
    order = np.arange(width).reshape(groups, width // groups).T.reshape(-1)
    return e.op("Gather", e.value(node), order, axis=1)


SPATIAL: dict[str, Writer] = {
    **{f"aten.{kind}_pool{n}d.default": _pool for kind in ("max", "avg") for n in (1, 2, 3)},
    **{f"aten.max_pool{n}d_with_indices.default": _pool for n in (1, 2, 3)},
    **{f"aten.adaptive_{kind}_pool{n}d.default": _adaptive_pool for kind in ("max", "avg") for n in (1, 2, 3)},
    **{f"aten._adaptive_avg_pool{n}d.default": _adaptive_pool for n in (2, 3)},
    **{f"aten.{name}.{kind}": _resize for name in RESIZED for kind in ("vec", "default")},
    **{f"aten.{name}.default": _grid_sample for name in ("grid_sampler", "grid_sampler_2d")},
    **{f"aten.{name}.default": _pad for name in ("constant_pad_nd", "pad")},
    **{f"aten.{kind}_pad{n}d.default": _pad for kind in ("reflection", "replication") for n in (1, 2, 3)},
    "aten.im2col.default": _patches,
    "aten.col2im.default": _patches,
    "aten.pixel_shuffle.default": _pixel_shuffle,
    "aten.pixel_unshuffle.default": _pixel_shuffle,
    "aten.channel_shuffle.default": _channel_shuffle,
    "aten.native_channel_shuffle.default": _channel_shuffle,
}
"""ATen operation -> how it is written."""
