"""Every operation that export writes, in its runtimes, against torch: with odd and negative arguments, and batches that
it was not captured with."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantlens.errors import UnsupportedError
from quantlens.graph import capture

pytest.importorskip("onnx", reason="the deploy extra is not installed")
pytest.importorskip("onnxruntime", reason="the deploy extra is not installed")

SIZE = (4, 6, 10)
GENERATOR = torch.Generator().manual_seed(0)
SHAPES = {
    "c": (4,),
    "d": (4,),
    "wide": (10,),
    "pos": (4, 6, 10),
    "flat": (5, 10),
    "grid": (1, 5, 7, 2),
    "gates": (20, 10),
}
KERNELS = {"conv": (8, 2, 3, 3), "deep": (4, 3, 2, 3), "one": (5, 24, 3), "vol": (2, 1, 3, 3, 3)}
HELD = {name: torch.randn(*size, generator=GENERATOR) * 0.3 for name, size in (SHAPES | KERNELS).items()}
PICK = torch.tensor([3, 0, 2])
MASK = torch.arange(60).reshape(6, 10) % 3 == 0


def _half(x):
    return x.abs() + 0.5


def _each(names, function):
    """Cases that differ in one function: ``function(f, x)`` for each that torch has under a name."""
    return {name: partial(function, getattr(torch, name, None) or getattr(F, name)) for name in names}


ALIKE = [
    *(
        "abs",
        "atan",
        "asinh",
        "ceil",
        "floor",
        "cos",
        "sin",
        "tan",
        "cosh",
        "sinh",
        "tanh",
        "erf",
        "exp",
        "exp2",
        "expm1",
    ),
    *("neg", "reciprocal", "round", "sigmoid", "sign", "square", "relu", "trunc", "frac", "silu", "mish", "logsigmoid"),
    *("hardswish", "hardsigmoid", "relu6", "leaky_relu", "selu", "gelu", "tanhshrink"),
]

ONE_VALUE = {
    **_each(ALIKE, lambda f, x: f(x)),
    **_each(["log", "log2", "log10", "log1p", "sqrt", "rsqrt"], lambda f, x: f(_half(x))),
    "acosh": lambda x: torch.acosh(1 + _half(x)),
    "atanh": lambda x: torch.atanh(x.tanh() * 0.9),
    "asin of small": lambda x: torch.asin(x.tanh()),
    "acos of small": lambda x: torch.acos(x.tanh()),
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.2),
    "leaky": lambda x: F.leaky_relu(x, 0.3),
    "elu": lambda x: F.elu(x, 0.7),
    "celu": lambda x: F.celu(x, 1.7),
    "threshold": lambda x: F.threshold(x, 0.1, -3.0),
    "softplus": lambda x: F.softplus(x, 2.0, 1.0),
    "softplus far out": lambda x: F.softplus(x * 60),
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "glu": lambda x: F.glu(x, -3),
    "prelu": lambda x: F.prelu(x, HELD["c"]),
    "prelu of one": lambda x: F.prelu(x, HELD["c"][:1]),
    "softmax": lambda x: x.softmax(-3),
    "log softmax": lambda x: x.log_softmax(1),
    "cumsum": lambda x: x.cumsum(-2),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp one side": lambda x: x.clamp(max=0.1) + x.clamp(min=0.2) + x.clamp_min(0.3),
    "clamp tensors": lambda x: x.clamp(-HELD["pos"].abs(), HELD["pos"].abs()),
    "clamp of integers": lambda x: (x * 4).long().clamp(-1, 2),
    "bool and back": lambda x: x.round().bool().float(),
    "cut to integers": lambda x: (x * 4).to(torch.int32).to(torch.float64),
    "type_as": lambda x: (x > 0).type_as(x),
}

TWO_VALUES = {
    "add alpha": lambda x: torch.add(x, HELD["pos"], alpha=2.5),
    "sub alpha": lambda x: torch.sub(x, HELD["wide"], alpha=-2),
    "rsub": lambda x: torch.rsub(x, 3.0, alpha=0.5),
    "number first": lambda x: 2 - x + 3 / _half(x) + 2.0**x,
    "integers and floats": lambda x: (x * 4).long() * 1.5 + (x * 4).long() * x + (x > 0) * x,
    "sum of bools": lambda x: (x > 0) + (x < -1),
    "product of bools": lambda x: (x > 0) * (x < 1),
    "integers divided": lambda x: (x * 9).long() / 4,
    "div floor": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "div trunc": lambda x: torch.div((x * 9).long(), 2, rounding_mode="trunc"),
    "floor divide": lambda x: (x * 9).long() // 4,
    "remainder": lambda x: (x * 9).round() % 4 + (x * 9).long() % -4,
    "fmod": lambda x: torch.fmod((x * 9).round(), 4),
    "pow": lambda x: x**2 + x**3 + _half(x) ** -0.5 + _half(x) ** HELD["pos"],
    "maximum": lambda x: torch.maximum(x, HELD["pos"]) + torch.minimum(x, HELD["wide"]),
    "compared": lambda x: torch.stack([x > 0, x >= x.mean(), x < HELD["pos"], x <= 0.5, x != x.round()]),
    "equal integers": lambda x: (x * 2).long() == 1,
    "integer against float": lambda x: (x * 2).long() > 0.5,
    "logic": lambda x: torch.stack([(x > 0) & (x < 1), (x > 1) | (x < -1), (x > 0) ^ (x > 1), ~(x > 0)]),
    "logic of numbers": lambda x: torch.stack([torch.logical_and(x, x > 0), torch.logical_not(x > 0)]),
    "where": lambda x: torch.where(x > 0, x, HELD["pos"]) + torch.where(x > 0, 1.0, x) + torch.where(MASK, x, -2.0),
    "masked fill": lambda x: x.masked_fill(MASK, -3.0) + x.masked_fill(x > 0, HELD["c"][0]),
    "put under a mask": lambda x: torch.index_put(x, (x > 1,), torch.tensor(0.25)),
    "addcmul": lambda x: torch.addcmul(HELD["pos"], x, x, value=0.5) + torch.addcmul(x, HELD["pos"], x),
    "addcdiv": lambda x: torch.addcdiv(x, HELD["pos"], _half(x), value=-1),
    "lerp": lambda x: torch.lerp(x, HELD["pos"], 0.3) + torch.lerp(x, HELD["pos"], HELD["wide"]),
    "baddbmm": lambda x: torch.baddbmm(x[:, 0], x[:, 1], x[:, 2, :].mT @ x[:, 3, :], beta=0.5, alpha=2),
    "einsum": lambda x: torch.einsum("b c h w, b d h w -> b c d", x, x),
    "linear by images": lambda x: F.linear(x[:, 0], x[0, 1]),
}  # fmt: skip

OVER_DIMENSIONS = {
    **_each(["sum", "mean", "amax", "amin", "logsumexp", "var", "std"], lambda f, x: f(x, dim=(-1, 1))),
    **{f"{n} kept": c for n, c in _each(["sum", "mean", "amax", "prod"], lambda f, x: f(x, 2, keepdim=True)).items()},
    "of everything": lambda x: x.reshape(-1, 4, 60).softmax(1) * (x.sum() + x.mean() + x.max() - x.min()),
    "var biased": lambda x: x.var(-1, unbiased=False) + x.std(-1, correction=0),
    "var mean": lambda x: torch.cat(torch.var_mean(x, dim=(2, 3), keepdim=True)),
    "std mean": lambda x: torch.cat(torch.std_mean(x, dim=(2, 3), correction=1, keepdim=True)),
    "var mean alone": lambda x: torch.cat(torch.var_mean(x, dim=-1)),
    "sum of bools": lambda x: (x > 0).sum(-1),
    "any all": lambda x: torch.stack([(x > 1.5).any(-1), (x > -1).all(-1), (0.5 * x).any(2)[..., :6]]),
    "norms": lambda x: x.norm(dim=-1) + x.norm(p=1, dim=-1) + torch.linalg.vector_norm(x, 3, -1),
    "largest": lambda x: torch.linalg.vector_norm(x, float("inf"), (-1, 1)),
    "normalize": lambda x: F.normalize(x, dim=1) + F.normalize(x, p=1.0, dim=-1),
    "argmax": lambda x: x.argmax(1) + x.argmin(-3, keepdim=True)[:, 0],
    "max with places": lambda x: torch.cat([*x.max(1), *x.min(-3)]),
    "topk": lambda x: torch.cat(x.topk(3, -1)) + torch.cat(x.topk(3, 3, largest=False)),
    "sort": lambda x: torch.cat([*x.sort(1, descending=True), *x.sort(-3)]) + x.argsort(-3).repeat(4, 1, 1, 1),
}  # fmt: skip

NORMS = {
    "layer": lambda x: F.layer_norm(x, (6, 10), HELD["pos"][0], None, 1e-3) + F.layer_norm(x, (10,)),
    "rms": lambda x: F.rms_norm(x, (6, 10), HELD["pos"][0], 1e-3) + F.rms_norm(x, (10,)),
    "batch": lambda x: F.batch_norm(x, HELD["c"], HELD["d"].abs(), HELD["d"], HELD["c"]),
    "batch of rows": lambda x: F.batch_norm(x[..., 0].flatten(1), torch.zeros(24), torch.ones(24) * 3, eps=0.1),
    "group": lambda x: F.group_norm(x, 2, HELD["c"], HELD["d"], 1e-2) + F.group_norm(x[:, :, 0], 1)[:, :, None],
    "instance": lambda x: F.instance_norm(x, weight=HELD["c"], bias=HELD["d"]),
    "instance held": lambda x: F.instance_norm(x, HELD["c"], HELD["d"].abs(), HELD["d"], use_input_stats=False),
}  # fmt: skip


def _recurrent(x, layers, both, biases):
    """x [batch, 4, 6, 10] as rows of 6 sequences through LSTM layers 5 wide: outputs and last states."""
    directions, held = 1 + both, []
    for layer in range(layers):
        parts = [HELD["gates"][:, : 5 * directions if layer else 10], HELD["gates"][:, 5:], *HELD["gates"].T[:2]]
        held += [part + layer + 0.1 * way for way in range(directions) for part in parts[: 2 + 2 * biases]]
    start = x.new_zeros(layers * directions, 1, 5).expand(-1, x.shape[0], -1) + x[:, 0, 0, :5]
    found = torch.lstm(x[:, 1], (start, start * 0), held, biases, layers, 0.0, False, both, True)
    return torch.cat([part.flatten() for part in found])


RECURRENT = {
    "lstm": lambda x: _recurrent(x, 1, False, True),
    "lstm of layers and directions": lambda x: _recurrent(x, 2, True, True),
    "lstm without biases": lambda x: _recurrent(x, 2, False, False),
}

CONVOLUTIONS = {
    "groups": lambda x: F.conv2d(
        x, HELD["conv"], torch.ones(8), stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=2
    ),
    "same": lambda x: F.conv2d(x, HELD["conv"][:, :, :2], padding="same", dilation=(2, 1), groups=2),
    "valid": lambda x: F.conv2d(x, HELD["conv"], padding="valid", groups=2),
    "1d": lambda x: F.conv1d(x.flatten(1, 2), HELD["one"], stride=2, padding=1, dilation=2),
    "3d": lambda x: F.conv3d(x[:, None], HELD["vol"], padding=(1, 0, 2)),
    "transposed": lambda x: F.conv_transpose2d(x, HELD["deep"], torch.ones(3), (2, 3), 1, (1, 2), dilation=(1, 2)),
    "transposed groups": lambda x: F.conv_transpose2d(x, HELD["deep"], groups=2, stride=2),
    "transposed 1d": lambda x: F.conv_transpose1d(x[..., 0], HELD["deep"][:, :, 0], stride=2, output_padding=1),
    "filters from images": lambda x: F.conv2d(x[:, :2], x[:1].reshape(1, 2, 12, 10)[:, :, :3, :3]),
}

POOLING = {
    "max": lambda x: F.max_pool2d(x, (3, 2), (2, 3), (1, 0), ceil_mode=True),
    "max dilated": lambda x: F.max_pool2d(x, 2, 1, 1, dilation=(2, 3)),
    "max where ceil adds nothing": lambda x: F.max_pool2d(x, 2, 5, 1, ceil_mode=True),
    "max 1d": lambda x: F.max_pool1d(x[:, 0], 3, 2, 1, ceil_mode=True),
    "max 3d": lambda x: F.max_pool3d(x[:, None], 2, 2),
    "avg": lambda x: F.avg_pool2d(x, 2),
    "avg padded": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg without padding": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg ceil": lambda x: F.avg_pool2d(x, (3, 4), (2, 3), (1, 2), ceil_mode=True),
    "avg ceil without padding": lambda x: F.avg_pool2d(
        x, (3, 4), (2, 3), (1, 2), ceil_mode=True, count_include_pad=False
    ),
    "avg divisor": lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=5),
    "avg 1d": lambda x: F.avg_pool1d(x[:, 0], 3, 2, 1),
    "adaptive to one": lambda x: F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, 1),
    "adaptive even": lambda x: F.adaptive_avg_pool2d(x, (3, 5)) + F.adaptive_max_pool2d(x, (3, 5)),
    "adaptive uneven": lambda x: F.adaptive_avg_pool2d(x, (4, 7)) + F.adaptive_max_pool2d(x, (4, 7)),
    "adaptive wider": lambda x: F.adaptive_avg_pool2d(x, (7, None)),
    "adaptive 1d": lambda x: F.adaptive_avg_pool1d(x[:, 0], 3),
}

MODES = [("bilinear", False), ("bilinear", True), ("bicubic", False), ("bicubic", True), ("nearest", None)]
GRIDS = [("bilinear", "zeros", False), ("bilinear", "border", True), ("nearest", "zeros", True)]


def _resized(how, mode, aligned, x):
    return F.interpolate(x, mode=mode, align_corners=aligned, **how)


def _sampled(mode, padding, aligned, x):
    return F.grid_sample(x, HELD["grid"].expand(x.shape[0], -1, -1, -1) * 3, mode, padding, aligned)


RESIZING = {
    **{f"to a size, {m} {a}": partial(_resized, {"size": (9, 4)}, m, a) for m, a in [*MODES, ("nearest-exact", None)]},
    **{f"by a factor, {m} {a}": partial(_resized, {"scale_factor": (1.7, 0.6)}, m, a) for m, a in MODES},
    **{f"grid {mode}": partial(_sampled, *mode) for mode in [*GRIDS, ("bilinear", "reflection", False)]},
    "antialias": lambda x: F.interpolate(x, (4, 13), mode="bilinear", antialias=True),
    "antialias cubic": lambda x: F.interpolate(x, (4, 13), mode="bicubic", antialias=True, align_corners=True),
    "linear": lambda x: F.interpolate(x[:, 0], 13, mode="linear") + F.interpolate(x[:, 0], scale_factor=1.3),
    "twice": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
}

PADDING = {
    "constant": lambda x: F.pad(x, (1, 2, 3, 0), value=0.5),
    "cut": lambda x: F.pad(x, (-2, 1, 2, -1)),
    "cut alone": lambda x: F.pad(x, (-2, -3)),
    "reflect": lambda x: F.pad(x, (2, 1, 3, 0), mode="reflect") + F.pad(x, (2, 1, 3, 0), mode="replicate"),
    "circular": lambda x: F.pad(x, (2, 1, 0, 3), mode="circular"),
    "channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "of integers": lambda x: F.pad((x * 3).long(), (1, 1), value=7),
    "im2col": lambda x: F.unfold(x, (2, 3), (2, 1), (1, 0), (1, 2)),
    "col2im": lambda x: F.fold(F.unfold(x, 3, 1, 1, 2), (6, 10), 3, 1, 1, 2),
    "col2im with a rest": lambda x: F.fold(x.reshape(x.shape[0], 12, 20), (9, 10), 2, stride=2),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel shuffle": lambda x: F.channel_shuffle(x, 2),
}

MOVES = {
    "views": lambda x: x.flatten(2).unflatten(-1, (5, 12)).unsqueeze(-3).squeeze(2).mT.reshape(x.shape[0], -1),
    "squeeze": lambda x: x[:, :1].squeeze().unsqueeze(1).squeeze(1),
    "permuted": lambda x: x.permute(0, -1, 1, 2).movedim(1, -1).swapaxes(-1, 2).transpose(-2, -1),
    "windows": lambda x: x.reshape(x.shape[0], 4, 2, 3, 2, 5).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 3, 5),
    "windows and back": lambda x: (x.view(-1, 2, 3, 10) * 2).view(x.shape[0], -1, 6, 10),
    "batch beside others": lambda x: x.view(x.shape[0] * 4, 6, 10).mT.transpose(0, 1).reshape(10, x.shape[0], 24),
    "slices": lambda x: x[:, 1:3, ::2, 1:-2:3],
    "negative": lambda x: x[:, -1, -4:-1],
    "half of the batch's rows": lambda x: x.flatten(0, 1)[: x.shape[0]],
    "split": lambda x: torch.cat([*x.split(3, -1)][::-1], -1),
    "split unevenly": lambda x: torch.cat(x.split([1, 3, 6], -1)[::-1], -1),
    "chunks": lambda x: torch.cat(x.chunk(3, -1)[1:], -1),
    "tensor split": lambda x: torch.cat(x.tensor_split(3, -1)[::-1], -1),
    "unbind": lambda x: torch.stack([x.unbind(-2)[n] * (n + 2) for n in (4, 1)], -2),
    "flip": lambda x: x.flip(-1, 1),
    "roll": lambda x: x.roll((2, -3), (-1, 2)),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat in front": lambda x: x[:, 0].repeat(1, 1, 1, 2)[0],
    "repeat the batch": lambda x: HELD["pos"].repeat(x.shape[0], 1, 1, 1) * x,
    "interleaved": lambda x: x.repeat_interleave(2, -2),
    "batch interleaved": lambda x: x.repeat_interleave(3, 0),
    "stack": lambda x: torch.stack([x, x * 2], -1) + torch.stack([x, x + 1], 1).movedim(1, -1),
    "kinds together": lambda x: torch.cat([x, (x * 3).long(), x > 0], 1),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1, -1) + x[:, :1, :1].expand(-1, 5, 6, 10),
    "expand a constant": lambda x: torch.cat([HELD["flat"].expand(x.shape[0], -1, -1), x[:, 0]], 1),
    "expand as": lambda x: HELD["wide"].expand_as(x) * x,
    "select scatter": lambda x: x.select_scatter(x[:, :, 0] * 2, 2, -1),
    "slice scatter": lambda x: x.slice_scatter(x[:, :2] * 2, 1, 1, 3),
    "gather": lambda x: x.gather(2, (x[:, :, :3].sigmoid() * 5.9).long()),
    "scatter": lambda x: x.scatter(1, (x[:, :1].sigmoid() * 3.9).long(), 9.0),
    "index": lambda x: x[:, PICK] + x[:, PICK - 4] + x[:, torch.tensor([True, False, True, True])],
    "index by a matrix": lambda x: x[:, :, torch.tensor([[0, 1], [2, 5]])],
    "two indices": lambda x: x[:, PICK, PICK] + x[:, PICK[:, None], PICK[None]][:, 0],
    "indices apart": lambda x: x[:, PICK, :, PICK].movedim(0, 1),
    "indices from images": lambda x: x[torch.arange(x.shape[0]), x[:, :, 0, 0].argmax(-1)],
    "index select": lambda x: x.index_select(-1, PICK) + x.index_select(-1, torch.tensor([1, 2, 3])),
    "embedding": lambda x: F.embedding((x[:, 0].sigmoid() * 4.9).long(), HELD["flat"]),
    "one hot": lambda x: F.one_hot((x[:, 0].sigmoid() * 4.9).long(), 6),
    "unfold": lambda x: x.unfold(2, 3, 2).unfold(-2, 4, 3),
    "triangles": lambda x: x.tril(1) + x.triu(-1),
    "made": lambda x: x + torch.zeros(x.shape[0], 1, 1, 10) + x.new_full((x.shape[0], 1, 1, 1), 2),
    "made alone": lambda x: x + torch.eye(10)[:6] * torch.linspace(0, 1, 10),
    "counted": lambda x: x + torch.arange(10) + torch.arange(x.shape[0])[:, None, None, None],
    "sizes as numbers": lambda x: x.flatten(1) * x.shape[0] + x.sum() / x.shape[0],
    "tables": lambda x: x * torch.stack(torch.meshgrid(torch.arange(6), torch.arange(10), indexing="ij")).sum(0),
    "filled": lambda x: x * torch.full_like(x, 2.0) + torch.full((x.shape[0], 1, 1, 1), 3.0),
    "half precision between": lambda x: x.half().float() * 0 + x,
}  # fmt: skip

GROUPS = {
    "one value": ONE_VALUE, "two values": TWO_VALUES, "over dimensions": OVER_DIMENSIONS, "norms": NORMS,
    "convolutions": CONVOLUTIONS, "pooling": POOLING, "resizing": RESIZING, "padding": PADDING, "moves": MOVES,
    "recurrent": RECURRENT,
}  # fmt: skip


class Together(nn.Module):
    """The results of many functions, one row for each image where they have any."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def forward(self, x):
        return torch.cat([function(x).to(torch.float32).flatten() for function in self.functions])


def written(module, size=SIZE):
    """The bytes of an ONNX file of what a module gives."""
    from onnx import TensorProto, helper

    from quantlens.export.onnx_codes import OPSET
    from quantlens.export.onnx_file import check, pieces
    from quantlens.export.onnx_graph import Emitter
    from quantlens.export.onnx_operations import write_graph

    e = Emitter(capture(module, torch.zeros(2, *size)), {})
    e.op("Identity", *write_graph(e), out="y")
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *size])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    made = helper.make_graph(e.nodes, "made", [images], [y])
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    constants = list(e.constants.values())
    check(proto, constants)
    return b"".join(pieces(proto, constants))


def onnxruntime(data):
    import onnxruntime as ort

    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda x: session.run(["y"], {"images": x.numpy()})[0]


def openvino(data):
    pytest.importorskip("openvino", reason="the deploy extra is not installed")
    from quantlens.export.export import openvino_core

    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino_core().compile_model(openvino_core().read_model(data), "CPU", settings)
    return lambda x: compiled({"images": x.numpy()})["y"]


@cache
def written_group(group):
    return written(Together(list(GROUPS[group].values())))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("runtime", [onnxruntime, pytest.param(openvino, marks=pytest.mark.slow)])
def test_operations(group, runtime):
    """All of a group in one file; what differs is named."""
    wrong = differing(GROUPS[group], runtime(written_group(group)))
    assert not wrong, wrong


def differing(functions, run):
    wrong = {}
    for batch in (1, 3):
        x = torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(batch))
        expected = [function(x).to(torch.float32).flatten() for function in functions.values()]
        got = torch.from_numpy(np.array(run(x))).split([len(e) for e in expected])
        for name, a, b in zip(functions, expected, got, strict=True):
            if not torch.allclose(a, b, atol=1e-5, rtol=1e-5):
                wrong[name] = f"batch {batch}: {float((a - b).abs().max()):.2g} of {float(a.abs().max()):.2g}"
    return wrong


class Odd(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(torch.linalg.matrix_exp(x[..., :6]))


def test_what_is_not_known_is_named_with_its_place():
    body = nn.Sequential(OrderedDict(body=nn.Sequential(OrderedDict(bad=Odd()))))
    with pytest.raises(UnsupportedError, match=r"matrix_exp\.default \(body\.bad\).*bessel_j0\.default \(body\.bad\)"):
        written(body)
