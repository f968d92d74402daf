"""A linear layer or convolution changed with what stands beside it: factors taken up, split in parts (outlier
channels), channels in another order.

What it computes together with them stays as it is, to float rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.graph import Graph, Site, argument, classifier_terms, op_name, origin, replace_argument

aten = torch.ops.aten

ACTIVATIONS = {"aten.gelu.default", "aten.relu.default"}
"""Operations on single elements between the two layers of an MLP."""


def alone(graph: Graph, site: Site) -> bool:
    """Whether nothing else reads the parameters of a layer or LayerNorm, so that they can be changed for it."""
    own = [a for a in site.node.all_input_nodes if a.op == "get_attr"]
    names = {a.target for a in own}
    return all(len(a.users) == 1 for a in own) and len(names) == len(own) == sum(
        node.op == "get_attr" and node.target in names and bool(node.users) for node in graph.fx.nodes
    )


def ensure_bias(graph: Graph, linear: Site) -> str:
    """The name of the linear's bias, which is made (zeros) if it has none."""
    if linear.bias is not None:
        return linear.bias
    name, weight = graph.unused(linear.name, ".bias"), graph.tensor(str(linear.weight))
    replace_argument(linear.node, "bias", graph.insert_tensor(linear.node, name, weight.new_zeros(len(weight))))
    return name


def add_to_bias(graph: Graph, layer: Site, value: Tensor, channels: Tensor | None = None) -> None:
    """Add float64 numbers to a layer's bias, which is made where it has none, or to these channels of it."""

    def added(bias: Tensor) -> Tensor:
        place = slice(None) if channels is None else channels.to(bias.device)
        bias[place] += value.to(bias.device)
        return bias

    graph.change(ensure_bias(graph, layer), added)


def change_input(
    graph: Graph, layer: Site, new: Callable[[Tensor], Tensor] | None = None, shift: Tensor | None = None
) -> None:
    """Let a linear layer read x' in place of x = T·x' + shift: its weight becomes ``new(weight)``, which is W·T in
    float64 (None: T = 1); its bias is the caller's. Of the classifier the graph notes what x is: its features stay on
    the axes of the captured model."""
    name = str(layer.weight)
    if is_classifier(graph, layer):
        factor = torch.eye(graph.tensor(name).shape[1], dtype=torch.float64, device=graph.device)
        factor = factor if new is None else new(factor)
        scale = factor.diagonal()
        note_input(graph, layer, scale if torch.equal(factor, scale.diag()) else factor, shift)
    if new is not None:
        graph.change(name, new)


def is_classifier(graph: Graph, layer: Site) -> bool:
    """Whether a linear layer is one of those whose sum is the model's output."""
    return any(node is layer.node for node, _ in classifier_terms(graph) or ())


def note_input(graph: Graph, layer: Site, factor: Tensor, shift: Tensor | None) -> None:
    """Note of a layer of the classifier that what it read is T·x + shift [D] of what it reads now. factor: T, as
    :func:`quantlens.graph.on_axes` takes it."""
    name = str(layer.weight)
    weight = graph.tensor(name)
    shift = torch.zeros(weight.shape[1]) if shift is None else shift
    step = (factor.to(weight), shift.to(weight))
    graph.axes[name] = (step, *graph.axes.get(name, ()))


def fold_layer_scale(graph: Graph) -> list[str]:
    """Fold every per-channel factor that follows a linear (LayerScale) into the linear's weight and bias.

    Returns the names of the linears changed. Exact to float rounding; the multiplication disappears from the graph.
    """
    by_node: Any = graph.sites.by_node
    changed = []
    for node in list(graph.fx.nodes):
        if op_name(node) != "aten.mul.Tensor" or len(node.args) != 2:
            continue
        for value, factor in (node.args, node.args[::-1]):
            linear, gamma = by_node.get(value), graph.constant(factor)
            if linear is None or gamma is None or linear.kind != "linear" or len(linear.node.users) != 1:
                continue
            if gamma.shape != linear.node.meta["shape"][-1:] or not alone(graph, linear):
                continue
            weight = str(linear.weight)
            graph.set_tensor(weight, graph.tensor(weight) * gamma[:, None])
            if linear.bias is not None:
                graph.set_tensor(linear.bias, graph.tensor(linear.bias) * gamma)
            node.replace_all_uses_with(linear.node)
            graph.fx.erase_node(node)
            if not factor.users:  # type: ignore[union-attr]
                graph.fx.erase_node(factor)  # type: ignore[arg-type]
            changed.append(linear.name)
            break
    graph.invalidate()
    return changed


def split_linear(graph: Graph, linear: Site, parts: Mapping[str, Tensor]) -> list[str]:
    """Give some input channels of a linear layers of their own and add their outputs, so that each part can have
    quantizers of its own: y = W₁x₁ + W₂x₂ + … + bias.

    parts: by suffix of the new site's name, int64 [m] channels, disjoint; raises ValueError unless at least one stays
    with ``linear``. They are selected by index, also where they are contiguous: a slice would pass for the same tensor,
    which a fully quantized method quantizes once. Export writes contiguous ones (see :func:`permute_hidden`) as slices.

    Returns the names of the new sites, ``<name>.<suffix>`` (widths given for ``<name>`` are theirs too). The caller
    calls :meth:`Graph.invalidate` when all is done.
    """
    node, weight, source = linear.node, graph.tensor(str(linear.weight)), linear.node.args[0]
    rest = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    chosen = {}
    for suffix, channels in parts.items():
        stem = graph.unused(f"{linear.name}.{suffix}", ".weight").removesuffix(".weight")
        chosen[stem] = channels.sort().values.to(weight.device)
        rest[channels] = False
    if not bool(rest.any()):
        raise ValueError(f"{linear.name}: no input channel is left of {len(rest)}")

    def read(name: str, channels: Tensor) -> fx.Node:
        held = graph.insert_tensor(node, graph.unused(name, "_channels"), channels)
        shape = (*source.meta["shape"][:-1], len(channels))  # type: ignore[union-attr]
        return graph.insert(node, aten.index_select.default, (source, -1, held), shape)

    outputs = []
    for stem, channels in chosen.items():
        part, held = read(stem, channels), weight[:, channels].contiguous()
        made = graph.insert_tensor(node, f"{stem}.weight", held)
        outputs.append(graph.insert(node, aten.linear.default, (part, made), node.meta["shape"]))
    kept = rest.nonzero().flatten()
    replace_argument(node, 0, read(linear.name, kept))
    graph.set_tensor(str(linear.weight), weight[:, kept].contiguous())
    readers, total = list(node.users), node
    for part in outputs:
        with graph.fx.inserting_after(total):
            total = graph.fx.call_function(aten.add.Tensor, (total, part))
        total.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, total)
    return list(chosen)


def permute_hidden(graph: Graph, first: Site, second: Site, order: Tensor) -> None:
    """Order the hidden channels between two linear layers anew, exactly: new channel i is old channel ``order[i]``.

    order: int64 [C], a permutation. Between the layers there may be nothing but operations on single elements, and
    nothing else may read the values: the caller has seen to it (:func:`hidden_source` finds such pairs).
    """
    for name in (first.weight, first.bias):
        if name is not None:
            graph.set_tensor(name, graph.tensor(name)[order.to(graph.tensor(name).device)].contiguous())
    change_input(graph, second, lambda weight: weight[:, order.to(weight.device)])


def hidden_source(graph: Graph, linear: Site) -> Site | None:
    """The linear layer whose outputs ``linear`` reads through one activation function, where nothing else reads them
    and no other layer has the same weights; None if there is none."""
    node: Any = linear.node.args[0]
    while op_name(node) in ACTIVATIONS and len(node.users) == 1:
        node = node.args[0]
    source = graph.sites.by_node.get(node)
    own = (
        source is not None
        and source.kind == "linear"
        and len(node.users) == 1
        and alone(graph, source)
        and alone(graph, linear)
    )
    return source if own else None


def rescale_input(graph: Graph, layer: Site, scale: Tensor, shift: Tensor | None = None) -> None:
    """Let a linear or convolution read x/scale − shift, by operations of their own in front of it, and undo it in
    the weight and bias exactly: W ← W·diag(scale), bias ← bias + W_new·shift.

    scale, shift: [in channels], scale > 0. Raises ValueError where they do not fit: a convolution with groups, or one
    that pads, with a shift (padding is not shifted). The caller calls :meth:`Graph.invalidate` when all is done.
    """
    node, source, name = layer.node, layer.node.args[0], str(layer.weight)
    weight = graph.tensor(name)
    spread = (-1, *[1] * (weight.dim() - 2))
    if weight.shape[1] != len(scale) or argument(node, "groups", 1) != 1:
        raise ValueError(f"{layer.name}: {len(scale)} factors for {weight.shape[1]} input channels")
    if shift is not None and pads(layer):
        raise ValueError(f"{layer.name} pads its input, and padding is not shifted")
    precise = scale.to(weight.device, torch.float64)
    value = with_constant(graph, node, aten.mul.Tensor, source, (layer.name, "_input_factor"), 1.0 / precise, spread)
    if shift is not None:
        moved = shift.to(weight.device, torch.float64)
        add_to_bias(graph, layer, (weight.double() * precise.view(spread) * moved.view(spread)).flatten(1).sum(1))
        value = with_constant(graph, node, aten.add.Tensor, value, (layer.name, "_input_shift"), -moved, spread)
    graph.change(name, lambda weight: weight * precise.view(spread))
    replace_argument(node, 0, value)


def pads(layer: Site) -> bool:
    """Whether a layer is a convolution that pads its input."""
    padding = argument(layer.node, "padding", 0)
    return any(p not in (0, "valid") for p in ([padding] if isinstance(padding, int | str) else padding))


def with_constant(
    graph: Graph,
    before: fx.Node,
    operation: Any,
    value: Any,
    called: tuple[str, str],
    constant: Tensor,
    spread: tuple[int, ...],
) -> fx.Node:
    """``operation(value, constant)`` in front of a layer, in its module; constant [C], viewed as ``spread``, in the
    weight's type, under the name ``called`` (see :meth:`Graph.unused`)."""
    name, kind = graph.unused(*called), graph.constant(before.args[1]).dtype  # type: ignore[union-attr]
    held = graph.insert_tensor(before, name, constant.to(kind).view(spread))
    return graph.insert(before, operation, (value, held), value.meta["shape"])


def pixel_readers(graph: Graph, channels: int) -> list[Site]:
    """The convolutions that read the image where pixel/255 is exact: with a weight of their own, that see all channels
    and pad nothing."""
    return [
        site
        for site in graph.sites.of_kind("conv")
        if site.edges["input"].value is graph.input
        and alone(graph, site)
        and not pads(site)
        and graph.tensor(str(site.weight)).shape[1] == channels
    ]


def read_pixels(graph: Graph, readers: Sequence[Site], mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """Let these convolutions read pixel/255 (a picture has 256 values per channel to begin with); returns the keys of
    their input edges. mean and std: per channel, in units of 0 … 1, what images are normalised with.

    Models read (pixel/255 − mean)/std. One scale for that tensor lies between the pixels' own values: with mean = std =
    0.5 the zero point 127.5 is rounded, and every value is half a step off. Here the graph computes pixel/255 again,
    which the weight and bias of the patch embedding undo, and the codes of pixel/255 with scale 1/255 and zero point 0
    are the pixels: nothing is lost. The function of the graph is unchanged.
    """
    centre, spread = (torch.tensor(v, dtype=torch.float64, device=graph.device) for v in (mean, std))
    for site in readers:
        rescale_input(graph, site, 1.0 / spread, -centre)
    graph.invalidate()
    return [f"{site.name}.input" for site in readers]


# -- outlier channels ----------------------------------------------------------------------------------------------
# Outlier channels: input channels of a linear layer that are far larger than all others.
#
# A trained transformer may put one value of several hundred into one channel after a GELU, for a few tokens of every
# image, where all other channels stay below seven (Sun et al., 2024, "Massive Activations in Large Language Models").
# One scale for the tensor then has no codes left for the rest. No factor can be moved through a GELU, and a factor
# moved into the weights makes their column the outlier. Splitting the layer is exact: y = W₁x₁ + W₂x₂ + bias, the
# outlier channels x₂ with a scale of their own (LLM.int8()'s decomposition, Dettmers et al., 2022, with integers on
# both sides).


RATIO = 16.0
"""A channel is an outlier if its largest magnitude exceeds this many times the median channel's: four bits of an
integer code would go to it alone."""

SHARE = 1 / 16
"""A layer with more outlier channels than this share of all is left alone: its channels are uneven."""


def outlier_channels(largest: Tensor, ratio: float = RATIO) -> Tensor:
    """Outliers among channels with largest magnitudes [C]: int64 [m], none if they are more than :data:`SHARE`."""
    outliers = (largest > ratio * largest.median()).nonzero().flatten()
    return outliers if len(outliers) <= SHARE * len(largest) else outliers[:0]


def outlier_candidates(graph: Graph) -> list[Site]:
    """Linear layers that may be split: those of blocks that read an activation function (not a LayerNorm, whose
    channels can be rescaled exactly, nor an attention) and have parameters of their own."""
    skipped = {site.node for site in graph.sites.of_kind("layer_norm", "context", "linear", "conv")}
    layers = [site for site in graph.sites.of_kind("linear") if site.block is not None]
    return [site for site in layers if origin(site.node.args[0]) not in skipped and alone(graph, site)]


def split_outliers(graph: Graph, channels: Mapping[str, Tensor]) -> list[str]:
    """Split input channels off layers (by site name, int64 [m] each); returns one sentence per layer. The function is
    unchanged. Where nothing else reads a layer's input, the channels are put after the others before (exactly), so that
    each part is a slice, not a gather, where the model is exported."""
    done = []
    for name, chosen in channels.items():
        names = ", ".join(map(str, chosen.tolist()))
        done.append(f"outlier input channel{'s' if len(chosen) > 1 else ''} {names} of {name} split off")
        site = graph.sites[name]
        source, last = hidden_source(graph, site), graph.tensor(str(site.weight)).shape[1]
        if source is not None:
            rest = torch.ones(last, dtype=torch.bool, device=chosen.device)
            rest[chosen] = False
            permute_hidden(graph, source, site, torch.cat([rest.nonzero().flatten(), chosen]))
            chosen = torch.arange(last - len(chosen), last)
        split_linear(graph, site, {"massive": chosen})
    graph.invalidate()
    return done
