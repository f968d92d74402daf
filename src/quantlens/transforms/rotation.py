"""Exact rotations: an orthogonal matrix on the channels of the residual stream, or of a head's values, that the weights
on both sides absorb.

A rotation spreads what a few channels hold over all of them, so that one scale fits every channel (QuaRot, Ashkboos et
al., NeurIPS 2024; SpinQuant). Language models need RMSNorm for it. A LayerNorm subtracts the mean first, but if Q maps
the vector of ones to itself, mean and variance of Qx are those of x, and LN(Qx) = Q·LN(x) once scale and shift are
folded into the layers after it: no other norm is needed, and no centring matrix (:func:`mean_keeping`).

* :func:`find_residuals` finds the streams of which the graph proves that this is exact, whatever the modules are
  called; :func:`rotate_residual` rotates one.
* :func:`rotate_input` rotates what a layer reads where no layer before it can take the rotation up (after a GELU, or
  after a LayerNorm whose scale is to act first), by a small product of its own in front of it, on blocks of channels;
  :func:`hadamard` is the matrix for it.

Rotations inside the heads of an attention are in :mod:`quantlens.transforms.heads`.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from quantlens.graph import (
    ADDS,
    ROTATION,
    VIEWS,
    Graph,
    Site,
    argument,
    axes_of_last,
    dynamic_nodes,
    op_name,
    replace_argument,
    walk,
)
from quantlens.transforms.layers import (
    ACTIVATIONS,
    add_to_bias,
    alone,
    change_input,
    is_classifier,
    note_input,
    with_constant,
)
from quantlens.transforms.norms import NormGroup, find_norm_groups, fold_norm, keeps_channels_last

aten = torch.ops.aten

LARGEST, SMALLEST = 64, 8
"""Input channels of a layer that are rotated together at run time, at most and at least."""


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [size, size], float64, uniform over all of them."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def mean_keeping(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [size, size], float64, that maps the vector of ones to itself."""
    start = torch.randn(size, size, generator=generator, dtype=torch.float64)
    start[:, 0] = 1
    others = torch.linalg.qr(start).Q[:, 1:]
    return 1 / size + others @ orthogonal(size - 1, generator) @ others.T


@dataclass
class Residual:
    """A residual stream of ``channels`` channels: what writes to it and what reads it.

    layers: linear and conv sites whose output channels are its channels. constants: names of parameters [.., channels]
    added or joined to it (class token, position embedding). norms: the LayerNorms that read it, each with its linear
    layers.
    """

    channels: int
    layers: list[Site] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    norms: list[NormGroup] = field(default_factory=list)


def find_residuals(graph: Graph) -> list[Residual]:
    """The residual streams that can be rotated: sums, joins and moves of tokens alone, written by linear layers,
    convolutions and constants of their own, read by LayerNorms alone that feed linear layers alone. A stream that
    anything else reads or writes (Swin's, whose channels are joined between stages) is left out."""
    groups = {group.norm.node: group for group in find_norm_groups(graph)}
    found: list[Residual] = []
    seen: set[fx.Node] = set()
    for norm in groups:
        if norm.args[0] in seen:
            continue
        channels = int(norm.args[0].meta["shape"][-1])  # type: ignore[union-attr]
        sources = partial(_sources, channels)

        def onward(node: fx.Node, sources: Any = sources) -> list[fx.Node]:
            return [*(sources(node) or ()), *(user for user in node.users if node in (sources(user) or ()))]

        stream = list(walk([norm.args[0]], onward))  # type: ignore[list-item]
        seen.update(stream)
        residual = _residual(graph, stream, channels, groups)
        if residual is not None:
            found.append(residual)
    return found


def _residual(
    graph: Graph,
    stream: list[fx.Node],
    channels: int,
    groups: dict[fx.Node, NormGroup],
) -> Residual | None:
    """What writes and reads all nodes of a stream; None if something keeps it from being rotated."""
    residual, inside = Residual(channels), set(stream)
    for node in stream:
        for user in node.users:
            if user in groups and user.args[0] is node:
                residual.norms.append(groups[user])
            elif user not in inside:
                return None
        if _sources(channels, node) is not None:
            continue
        layer = node if op_name(node) == "aten.linear.default" else _conv_after(node)
        site = graph.sites.by_node.get(layer)  # type: ignore[arg-type]
        if site is not None and alone(graph, site):
            residual.layers.append(site)
        elif _is_constant(graph, node) and node.meta["shape"][-1:] == (channels,):
            residual.constants.append(str(node.target))
        else:
            return None
    return residual


def _sources(channels: int, node: fx.Node) -> list[fx.Node] | None:
    """What a node of the stream passes on: both summands, all that is joined, or the value that it moves. ``None`` if
    it is something else."""
    op, nodes = op_name(node), node.all_input_nodes
    if not _wide(node, channels):
        return None
    last = len(node.meta["shape"]) - 1
    if op in ADDS and not node.kwargs and len(nodes) == len(node.args) and all(_wide(n, channels) for n in nodes):
        return nodes
    if op == "aten.cat.default":
        return nodes if argument(node, "dim") % (last + 1) != last else None
    if not nodes or not _wide(nodes[0], channels):
        return None
    if op == "aten.mean.dim":
        rank = len(nodes[0].meta["shape"])
        return nodes[:1] if all(dim % rank != rank - 1 for dim in argument(node, "dim")) else None
    return nodes[:1] if op == "aten.expand.default" or keeps_channels_last(node, nodes[0]) else None


def _wide(node: fx.Node, channels: int) -> bool:
    shape = node.meta.get("shape")
    return bool(shape) and shape[-1] == channels


def _is_constant(graph: Graph, node: fx.Node) -> bool:
    """Whether a node is a parameter that the graph holds nowhere else."""
    held = [n for n in graph.fx.nodes if n.op == "get_attr" and n.target == node.target]
    return graph.constant(node) is not None and held == [node]


def _conv_after(node: fx.Node) -> fx.Node | None:
    """The convolution whose output [B, C, h, w] this node holds as tokens [B, h·w, C] or [B, h, w, C]."""
    conv: Any = node
    while op_name(conv) in VIEWS:
        conv = conv.args[0]
        if len(conv.users) != 1:
            return None
    if "conv" not in op_name(conv) or len(conv.meta["shape"]) != 4 or argument(conv, "groups", 1) != 1:
        return None  # rows of other inputs do not mix
    return conv if axes_of_last({conv}, node) == (-3,) else None


def rotate_residual(graph: Graph, residual: Residual, rotation: Tensor) -> None:
    """Multiply the stream by ``rotation`` Q [C, C] (orthogonal, Q·1 = 1), exactly: writers put out Q·y, the LayerNorms'
    scale and shift go into their linear layers, and these read with W·Qᵀ."""
    q = rotation.to(graph.device, torch.float64)
    for group in residual.norms:
        fold_norm(graph, group)
    for site in residual.layers:
        graph.change(str(site.weight), lambda weight: (q @ weight.flatten(1)).reshape(weight.shape))
        if site.bias is not None:
            graph.change(site.bias, lambda bias: q @ bias)
    for name in residual.constants:
        graph.change(name, lambda value: value @ q.T)
    for linear in (linear for group in residual.norms for linear in group.linears):
        change_input(graph, linear, lambda weight: weight @ q.T)
    graph.invalidate()


def hadamard(size: int, generator: torch.Generator) -> Tensor:
    """A Hadamard matrix with random signs [size, size], float64, orthogonal: diag(±1)·H/√size; size is a power of two.

    Without the signs the mean of all channels would pile up in the first one.
    """
    from scipy.linalg import hadamard as sylvester

    matrix = torch.from_numpy(sylvester(size, dtype=float))
    return (torch.randint(0, 2, (size, 1), generator=generator) * 2 - 1) * matrix / size**0.5


def rotation_size(graph: Graph, site: Site) -> int:
    """How many input channels of a layer are rotated together: the largest power of two that divides their number, at
    most :data:`LARGEST`. :data:`LARGEST`, with zeros after them, where that is next to none (a layer of 767 channels,
    an outlier split off)."""
    channels = graph.tensor(str(site.weight)).shape[1]
    size = min(LARGEST, channels & -channels)
    return LARGEST if size < SMALLEST and channels > LARGEST else size


def layers_after_activations(graph: Graph) -> list[Site]:
    """Linear layers with weights of their own that read an activation function, or a product of two activations (gated
    MLPs), or some channels of these."""
    dynamic = dynamic_nodes(graph)

    def after(node: Any) -> bool:
        if op_name(node) == "aten.index_select.default":
            node = node.args[0]
        gated = op_name(node) == "aten.mul.Tensor" and all(n in dynamic for n in node.args)
        return gated or op_name(node) in ACTIVATIONS

    return [site for site in graph.sites.of_kind("linear") if after(site.node.args[0]) and alone(graph, site)]


def rotate_input(graph: Graph, linear: Site, rotation: Tensor, mean: Tensor | None = None) -> None:
    """Let a linear layer read x·diag(R, R, …) − t and undo it in its weight and bias, exactly: W ← W·diag(R, R, …),
    bias ← bias + W_new·t.

    rotation: R [n, n], orthogonal. Where n does not divide the layer's input channels, channels of zeros are put after
    them. mean: of x, [C]; t is what the rotation makes of it (None: 0). The product is an operation of its own in front
    of the layer, at n multiplications per channel and token; its constant is one for all layers that get an equal
    matrix. It is no site: it stays in float. The caller calls :meth:`Graph.invalidate` when all is done.
    """
    node, size, name = linear.node, len(rotation), str(linear.weight)
    source: Any = node.args[0]
    lead = source.meta["shape"][:-1]
    weight = graph.tensor(name)
    missing = -weight.shape[1] % size
    weight = F.pad(weight, (0, missing))
    blocks = weight.shape[1] // size
    held, value = f"hidden_{size}{ROTATION}", rotation.to(weight.device, weight.dtype)
    if held in graph.tensors() and not torch.equal(graph.tensor(held), value):
        held = graph.unused(linear.name, ROTATION)
    precise = rotation.to(weight.device, torch.float64)
    turned = weight.double().unflatten(1, (blocks, size)) @ precise
    if is_classifier(graph, linear):
        note_input(graph, linear, precise, mean)
    graph.set_tensor(name, turned.flatten(1).to(weight.dtype))
    if missing:
        source = graph.insert(node, aten.constant_pad_nd.default, (source, [0, missing]), (*lead, weight.shape[1]))
    constant = graph.insert_tensor(node, held, value)
    split = graph.insert(node, aten.unflatten.int, (source, -1, [blocks, size]), (*lead, blocks, size))
    product = graph.insert(node, aten.matmul.default, (split, constant), (*lead, blocks, size))
    joined = graph.insert(node, aten.flatten.using_ints, (product, -2, -1), (*lead, weight.shape[1]))
    if mean is not None:
        mean = F.pad(mean.to(weight.device, torch.float64), (0, missing))
        shift = (mean.unflatten(0, (blocks, size)) @ precise).flatten()
        add_to_bias(graph, linear, turned.flatten(1) @ shift)
        joined = with_constant(graph, node, aten.add.Tensor, joined, (linear.name, "_input_mean"), -shift, (-1,))
    replace_argument(node, 0, joined)
