"""Every exact transform keeps the function of any graph that it finds a place in, to float64 rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from exact_models import SHARED, SIZE, Conv, Net, Vit, drawn, nets, vits
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from torch import Tensor, fx, nn

from quantlens.calibration import CHUNK, Calibration
from quantlens.calibration.measured_transforms import read_as_pixels, split_outlier_channels, subtract_means
from quantlens.graph import Graph, capture
from quantlens.graph.graph import argument, op_name, replace_argument
from quantlens.transforms.heads import find_score_pairs, find_value_pairs, rescale_values, rotate_scores, rotate_values
from quantlens.transforms.layers import (
    alone,
    ensure_bias,
    fold_layer_scale,
    hidden_source,
    pads,
    permute_hidden,
    rescale_input,
    split_linear,
)
from quantlens.transforms.norms import (
    Factors,
    balance,
    columns,
    equalise_norms,
    find_norm_groups,
    fold_norm,
    rescale_norm,
    smooth_factors,
)
from quantlens.transforms.rotation import (
    find_residuals,
    hadamard,
    mean_keeping,
    orthogonal,
    rotate_input,
    rotate_residual,
)

aten = torch.ops.aten

TIGHT = 1e-9
"""Largest difference, in units of the largest output, that rounding in float64 may make."""

PREPROCESS = SimpleNamespace(mean=(0.48, 0.46, 0.41), std=(0.23, 0.22, 0.27), input_size=(3, SIZE, SIZE))


class Images(Calibration):
    """Pictures, in float64."""

    def chunk(self, index: int) -> Tensor:
        return self._images[index * CHUNK : (index + 1) * CHUNK].clone()


def pictures(seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (3, 3, SIZE, SIZE), generator=generator).double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (PREPROCESS.mean, PREPROCESS.std))
    return Images((pixels - mean) / std, 3, source="test", fingerprint=None, device=torch.device("cpu"))


# -- the transforms: each changes a graph wherever it can and says how often ---------------------------------------
class Chance:
    """Random numbers that a transform is given."""

    def __init__(self, seed: int, images: Images):
        self.generator, self.images = torch.Generator().manual_seed(seed), images

    def factors(self, count: int) -> Tensor:
        return torch.exp(torch.randn(count, generator=self.generator))

    def normal(self, count: int) -> Tensor:
        return torch.randn(count, generator=self.generator)

    def order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator)


def biases(graph: Graph, chance: Chance) -> int:
    sites = [s for s in graph.sites.of_kind("linear", "conv") if s.bias is None]
    for site in sites:
        ensure_bias(graph, site)
    assert all(s.bias is not None for s in graph.sites.of_kind("linear", "conv"))
    return len(sites)


def norms_rescaled(graph: Graph, chance: Chance) -> int:
    groups = find_norm_groups(graph)
    for group in groups:
        size = group.norm.node.meta["shape"][-1]
        rescale_norm(graph, group, chance.factors(size), chance.normal(size))
    return len(groups)


def norms_folded(graph: Graph, chance: Chance) -> int:
    groups = find_norm_groups(graph)
    for group in groups:
        fold_norm(graph, group)
    return len(groups)


def norms_equalised(graph: Graph, chance: Chance) -> int:
    groups, factors = find_norm_groups(graph), {}
    for number, group in enumerate(groups):
        size = group.norm.node.meta["shape"][-1]
        if number % 2:
            factors[group.norm.name] = balance(-chance.factors(size), chance.factors(size), 0.7)
        else:
            scale = smooth_factors(chance.factors(size), columns(graph, group))
            factors[group.norm.name] = Factors(scale, chance.normal(size))
    return len(equalise_norms(graph, groups, factors))


def layer_scale_folded(graph: Graph, chance: Chance) -> int:
    return len(fold_layer_scale(graph))


def inputs_rescaled(graph: Graph, chance: Chance) -> int:
    sites = [s for s in graph.sites.of_kind("linear", "conv") if alone(graph, s)]
    for site in sites:
        size = graph.tensor(site.weight).shape[1]
        shift = chance.normal(size)
        if site.kind == "conv" and argument(site.node, "groups") != 1:
            with pytest.raises(ValueError, match="factors"):
                rescale_input(graph, site, chance.factors(size))
            continue
        if site.kind == "conv" and pads(site):
            with pytest.raises(ValueError, match="pads"):
                rescale_input(graph, site, chance.factors(size), shift)
            shift = None
        rescale_input(graph, site, chance.factors(size), shift)
    return len(sites)


def inputs_rotated(graph: Graph, chance: Chance) -> int:
    sites = [s for s in graph.sites.of_kind("linear") if alone(graph, s)]
    rotation = orthogonal(8, chance.generator)
    for number, site in enumerate(sites):
        size = graph.tensor(site.weight).shape[1]
        matrix = (rotation, hadamard(4, chance.generator), rotation.T)[number % 3]
        rotate_input(graph, site, matrix, chance.normal(size) if number % 2 else None)
    return len(sites)


def linears_split(graph: Graph, chance: Chance) -> int:
    sites = [s for s in graph.sites.of_kind("linear") if alone(graph, s) and graph.tensor(s.weight).shape[1] > 3]
    for number, site in enumerate(sites):
        order = chance.order(graph.tensor(site.weight).shape[1])
        parts = {"massive": order[:1], "wide": order[1:3]} if number % 2 else {"massive": order[:2]}
        split_linear(graph, site, parts)
    return len(sites)


def hidden_permuted(graph: Graph, chance: Chance) -> int:
    pairs = [(hidden_source(graph, s), s) for s in graph.sites.of_kind("linear")]
    pairs = [(first, second) for first, second in pairs if first is not None]
    for first, second in pairs:
        permute_hidden(graph, first, second, chance.order(graph.tensor(second.weight).shape[1]))
    return len(pairs)


def residuals_rotated(graph: Graph, chance: Chance) -> int:
    found = find_residuals(graph)
    for residual in found:
        rotate_residual(graph, residual, mean_keeping(residual.channels, chance.generator))
    return len(found)


def values_rescaled(graph: Graph, chance: Chance) -> int:
    pairs = find_value_pairs(graph)
    for pair in pairs:
        rescale_values(graph, pair, chance.factors(len(pair.rows)))
    return len(pairs)


def values_rotated(graph: Graph, chance: Chance) -> int:
    pairs = find_value_pairs(graph)
    for pair in pairs:
        rotate_values(graph, pair, chance.generator)
    return len(pairs)


def scores_rotated(graph: Graph, chance: Chance) -> int:
    pairs = find_score_pairs(graph)
    for pair in pairs:
        rotate_scores(graph, pair, chance.generator)
    return len(pairs)


def means_taken_out(graph: Graph, chance: Chance) -> int:
    return len(subtract_means(graph, chance.images)[0])


def massive_split(graph: Graph, chance: Chance) -> int:
    return len(split_outlier_channels(graph, chance.images, 4.0))


def pixels_read(graph: Graph, chance: Chance) -> int:
    return len(read_as_pixels(graph, PREPROCESS, chance.images))


TRANSFORMS: list[Callable[[Graph, Chance], int]] = [
    layer_scale_folded,
    massive_split,
    pixels_read,
    biases,
    norms_rescaled,
    norms_folded,
    norms_equalised,
    residuals_rotated,
    hidden_permuted,
    values_rescaled,
    values_rotated,
    scores_rotated,
    means_taken_out,
    linears_split,
    inputs_rescaled,
    inputs_rotated,
]


# -- what must hold -------------------------------------------------------------------------------------------------
def same(got: Tensor, wanted: Tensor, what: str) -> None:
    off = float((got - wanted).abs().max() / wanted.abs().max())
    assert off < TIGHT, f"{what}: off by {off:.1e}"


def check_shapes(graph: Graph, images: Tensor, what: str) -> None:
    """Every node makes what the graph says of it."""
    nodes = [n for n in graph.fx.nodes if n.op == "call_function"]
    env = graph.run(nodes, {graph.input: images}, keep=nodes)
    for node in nodes:
        said, value = node.meta.get("shape"), env[node]
        if isinstance(value, Tensor) and said is not None:
            fits = len(said) == value.dim() and all(s in (None, d) for s, d in zip(said, value.shape, strict=True))
            assert fits, f"{what}: {node.name} is {list(value.shape)}, said to be {said}"


def check(model: nn.Module, seed: int) -> dict[str, int]:
    """Each transform alone, then all in a row, twice; returns how many places each one found."""
    images = pictures(seed)
    x = images.chunk(0)
    with torch.no_grad():
        graph = capture(model, x)
        expected = model(x)
        same(graph(x), expected, "capture")
        before, found = graph.clone().tensors(), {}
        for transform in TRANSFORMS:
            twin, name = graph.clone(share=True), transform.__name__
            found[name] = transform(twin, Chance(seed, images))
            twin.invalidate()
            same(twin(x), expected, name)
            check_shapes(twin, x, name)
            for key, value in graph.tensors().items():
                assert torch.equal(value, before[key]), f"{name} wrote into {key}, which another graph shares"
        done: list[str] = []
        for transform in TRANSFORMS * 2:
            transform(graph, Chance(seed + len(done), images))
            graph.invalidate()
            done.append(transform.__name__)
        same(graph(x), expected, " + ".join(done))
    return found


QUICK = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "phases": (Phase.explicit, Phase.reuse, Phase.generate),  # a smaller example takes minutes to find
}
EVERYTHING = Vit(
    dim=8,
    class_token=True,
    pre_norm=False,
    patch_padding=0,
    patch_bias=False,
    qkv="joint",
    qkv_bias=False,
    proj_bias=False,
    mlp_bias=True,
    head_bias=True,
    affine=("full", "full", "full"),
    layer_scale=True,
    act="gelu",
    softmax=-1,
    qk_norm=False,
    position_bias=True,
    fused=True,
    shared="nothing",
    massive=True,
)


@pytest.mark.parametrize("apart", [False, True])
def test_every_transform_finds_its_place(apart):
    kind = replace(EVERYTHING, qkv="apart", layer_scale=False) if apart else EVERYTHING
    found = check(drawn(kind, 1), 1)
    # a stream that LayerScale writes to is rotated once that is folded; biases are made where they are missing
    assert {name for name, count in found.items() if not count} == {
        "layer_scale_folded" if apart else "residuals_rotated"
    }


@pytest.mark.parametrize("shared", SHARED)
def test_what_two_places_share_keeps_its_function(shared):
    kind = replace(EVERYTHING, shared=shared, layer_scale=shared == "block", proj_bias=True, qkv="apart")
    check(drawn(kind, 2), 2)


@pytest.mark.slow
@settings(max_examples=6, **QUICK)
@given(kind=vits(), seed=st.integers(0, 1 << 20))
def test_transformers_keep_their_function(kind, seed):
    check(drawn(kind, seed), seed)


CONVOLUTIONS = {
    "stride and BatchNorm": (((8, 3, 2, 1, 1, 1, False, True, False),), False, "gelu", 1),
    "as convolution, in groups": (
        ((8, 1, 1, 0, 1, 1, True, False, True), (8, 3, 2, 1, 1, 8, True, False, False)), False, "gelu", 3
    ),
    "same padding, dilated": (((8, 3, 1, "same", 2, 1, False, False, False),), False, "relu", 2),
    "padded after a bias": (
        ((8, 2, 1, 0, 1, 1, True, False, False), (8, 1, 1, 1, 1, 8, False, False, True)), True, "relu", 74
    ),
}  # fmt: skip
"""Convolutions, whether the MLP has biases, its activation, and the seed."""


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_of_every_kind_keep_their_function(case):
    convs, biases, act, seed = CONVOLUTIONS[case]
    check(drawn(Net(tuple(Conv(*conv) for conv in convs), True, False, True, biases, act), seed), seed)


@pytest.mark.slow
@settings(max_examples=10, **QUICK)
@given(kind=nets(), seed=st.integers(0, 1 << 20))
def test_convolutions_keep_their_function(kind, seed):
    check(drawn(kind, seed), seed)


@pytest.mark.parametrize(
    ("move", "found"),
    [
        (lambda x: x, 0),
        (lambda x: x.transpose(2, 3), 0),
        (lambda x: x.permute(0, 2, 3, 1), 1),
        (lambda x: x[:, :, 0].flatten(1).unflatten(1, (8, 8)), 0),
        (lambda x: x.flatten(2).transpose(1, 2)[:, :8], 1),
        (lambda x: x.flatten(1).unflatten(1, (64, 8)), 0),
        (lambda x: x.flatten(2).transpose(1, 2)[:, :8].mean(1), 1),
        (lambda x: x.flatten(2).transpose(1, 2)[:, :8].mean(-1), 0),
    ],
)
def test_channels_are_told_from_columns(move, found):
    """Eight channels, eight rows, eight columns: a stream is rotated only where its last dimension is the channels."""

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(move(self.conv(x)))).flatten(1)

    torch.manual_seed(0)
    assert check(Square().double().eval(), 1)["residuals_rotated"] == found


# -- one argument of one call ---------------------------------------------------------------------------------------
X, W, B = "x", "w", "b"
CALLS = [
    (aten.conv2d.default, (X, W, None, [2, 2], [1, 1], [3, 3], 4), {}),
    (aten.conv2d.default, (X, W), {}),
    (aten.conv2d.default, (X, W), {"stride": [2, 2], "groups": 4}),
    (aten.conv2d.default, (X,), {"weight": W, "padding": [1, 1]}),
    (aten.conv2d.padding, (X, W, None, [1, 1], "same", [2, 2], 2), {}),
    (aten.convolution.default, (X, W, None, [2, 2], [1, 1], [3, 3], False, [0, 0], 4), {}),
    (aten.conv1d.default, (X, W, None, [2], [1], [1], 2), {}),
    (aten.conv3d.default, (X, W, None, [1, 2, 2]), {}),
    (aten.linear.default, (X, W), {}),
    (aten.layer_norm.default, (X, [8], W, None, 1e-6), {}),
]
"""Calls without a bias."""


def called(target, args, kwargs=None) -> tuple[fx.Node, dict[str, fx.Node]]:
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in (X, W, B)}

    def read(value):
        return nodes.get(value, value) if isinstance(value, str) else value

    kwargs = {k: read(v) for k, v in (kwargs or {}).items()}
    return graph.call_function(target, tuple(read(a) for a in args), kwargs), nodes


def everything(node: fx.Node) -> dict:
    """All arguments of a call, those that are left out too."""
    return {a.name: argument(node, a.name) for a in node.target._schema.arguments}


@pytest.mark.parametrize(("target", "args", "kwargs"), CALLS, ids=lambda v: str(v)[:60])
@pytest.mark.parametrize("by", ["position", "name"])
def test_one_argument_is_replaced_and_no_other(target, args, kwargs, by):
    for name in ("bias", "weight", "input", "padding", "groups", "eps"):
        node, nodes = called(target, args, kwargs)
        names = [a.name for a in target._schema.arguments]
        if name not in names:
            with pytest.raises(ValueError, match="has no argument"):
                replace_argument(node, name, 1)
            continue
        before = everything(node)
        value = {"padding": [5], "groups": 2, "eps": 0.5}.get(name, nodes[B])
        replace_argument(node, names.index(name) if by == "position" else name, value)
        assert everything(node) == {**before, name: value}
        assert not set(names[: len(node.args)]) & set(node.kwargs), "given twice"
        assert node in nodes[B].users or value is not nodes[B]


def test_an_argument_that_is_not_there_is_refused():
    node, nodes = called(aten.conv2d.default, (X,))
    with pytest.raises(ValueError, match="'weight'"):
        replace_argument(node, "bias", nodes[B])
    for which in (7, "scale"):
        with pytest.raises(ValueError, match="no argument"):
            replace_argument(node, which, 1)
    node, nodes = called(aten.gelu.default, (X,))
    replace_argument(node, "approximate", "tanh")  # by keyword alone
    assert (node.args, node.kwargs) == ((nodes[X],), {"approximate": "tanh"})
    assert op_name(node) == "aten.gelu.default"
