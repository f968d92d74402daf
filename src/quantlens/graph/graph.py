"""A model as a flat graph of ATen operations: the thing that sites, rewrites, simulation and export share.

A :class:`Graph` holds a :class:`torch.fx.Graph` whose nodes are the input placeholders, ``get_attr`` nodes (one per
parameter or constant, named as in the model's ``state_dict``), ``call_function`` nodes and one output. Every
``call_function`` node carries ``meta["module"]`` (qualified name of the module that made it) and ``meta["shape"]`` (a
tuple; the batch and what is derived from it is ``None``).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlens.errors import CaptureError, QuantlensError
from quantlens.graph.structure import Structure, boxes_of

EdgeHook = Callable[[str, Tensor], Tensor]
Steps = tuple[tuple[Tensor, Tensor], ...]

VIEWS = {
    "aten.reshape.default",
    "aten.view.default",
    "aten._unsafe_view.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.permute.default",
    "aten.transpose.int",
    "aten.unsqueeze.default",
    "aten.squeeze.dim",
    "aten.select.int",
    "aten.slice.Tensor",
    "aten.roll.default",
    "aten.clone.default",
    "aten.contiguous.default",
    "aten.expand.default",
    "aten.unbind.int",
    "aten.split.Tensor",
    "aten.split_with_sizes.default",
    "aten.chunk.default",
    "<built-in function getitem>",
}
"""Operations that move values without changing them."""

CHANNEL_OPS = {"aten.mul.Tensor", "aten.add.Tensor"}
"""Operations that rescale channels, where their second argument is a constant."""


def op_name(node: fx.Node) -> str:
    """``aten.linear.default`` for an ATen call, the function's own text for another, the node's op for the rest."""
    return str(node.target) if node.op == "call_function" else node.op


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of a call by its name in the operation's schema, given by position or by keyword; what the schema
    says where it is left out. ``default`` for an operation that has no such argument."""
    if name in node.kwargs:
        return node.kwargs[name]
    for position, described in enumerate(_schema(node)):
        if described.name == name:
            given = position < len(node.args) and not described.kwarg_only
            return node.args[position] if given else described.default_value
    return default


def replace_argument(node: fx.Node, which: int | str, value: Any) -> None:
    """Replace one argument of a call, by position or by its name in the operation's schema, and no other.

    An argument given by keyword stays one. One that is left out is appended, after the schema's defaults for those
    before it. Raises ValueError where the operation has no such argument, or no default for one before it.
    """
    schema = _schema(node)
    names = [a.name for a in schema]
    if which not in (names if isinstance(which, str) else range(len(names))):
        raise ValueError(f"{op_name(node)} has no argument {which!r}")
    position = names.index(which) if isinstance(which, str) else which
    if schema[position].kwarg_only or names[position] in node.kwargs:
        node.update_kwarg(names[position], value)
        return
    args, kwargs = list(node.args), dict(node.kwargs)
    for missing in schema[len(args) : position]:
        if missing.name not in kwargs and not missing.has_default_value():
            raise ValueError(f"{op_name(node)} is called without {missing.name!r}, which comes before {which!r}")
        args.append(kwargs.pop(missing.name, missing.default_value))
    node.args, node.kwargs = (*args[:position], value, *args[position + 1 :]), kwargs


def _schema(node: fx.Node) -> list[Any]:
    """The arguments that an ATen operation describes; nothing for another call."""
    found = getattr(node.target, "_schema", None)
    return list(found.arguments) if node.op == "call_function" and found is not None else []


class Graph(nn.Module):
    """A captured model. It takes and returns what the model takes and returns (to float rounding of attention).

    Attributes
    ----------
    fx: the :class:`torch.fx.Graph`.
    root: module that holds the parameters and constants under their qualified names.
    structure: what the model takes and returns, of which the graph's inputs and outputs are the tensors.
    axes: of the classifier's layers, by weight, what they read in the captured model, of what they read after exact
    transforms: steps x ← T·x + shift, given as (T, shift), the latest transform's first (see :func:`on_axes`).
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, structure: Structure | None = None):
        super().__init__()
        self.root = root
        self.fx = graph
        self.structure = Structure() if structure is None else structure
        self.axes: dict[str, Steps] = {}
        self._sites: Any = None
        self._module: fx.GraphModule | None = None

    # -- structure ------------------------------------------------------------------------------------------------
    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The placeholders: one for each tensor that the model takes."""
        return tuple(self.fx.find_nodes(op="placeholder"))

    @property
    def input(self) -> fx.Node:
        """The placeholder of the images."""
        return self.inputs[self.structure.image]

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes whose values the model returns."""
        found = next(n for n in reversed(self.fx.nodes) if n.op == "output").args[0]
        return tuple(found) if isinstance(found, tuple | list) else (found,)  # type: ignore[return-value,arg-type]

    @property
    def output(self) -> fx.Node:
        """The node whose value is measured: logits [B, K], or features [B, D]."""
        return self.outputs[self.structure.primary]

    @property
    def boxes(self) -> fx.Node | None:
        """The node whose value a detector's boxes [B, Q, 4] are; None of another model."""
        outputs = self.outputs
        number = boxes_of(self.structure.gives, [n.meta.get("shape") or () for n in outputs], self.structure.primary)
        return None if number is None else outputs[number]

    @property
    def sites(self) -> Any:
        """Sites by name, in execution order (:class:`quantlens.graph.sites.SiteMap`)."""
        if self._sites is None:
            from quantlens.graph.sites import find_sites

            self._sites = find_sites(self)
        return self._sites

    def is_image(self, value: Any) -> bool:
        """Whether a value is the graph's input, as it is or with its channels rescaled by constants (see
        :func:`quantlens.transforms.rescale_input`)."""
        while op_name(value) in CHANNEL_OPS and self.constant(value.args[1]) is not None:  # type: ignore[arg-type]
            value = value.args[0]
        return value is self.input

    def invalidate(self) -> None:
        """Forget what was derived from the graph; call after any change to it."""
        self._sites = None
        self._module = None

    # -- tensors --------------------------------------------------------------------------------------------------
    def tensor(self, name: str) -> Tensor:
        """Parameter or constant by qualified name: the tensor itself, so that a write into it changes this graph, and
        those that share its tensors (``clone(share=True)``), but no model: the graph that a method is given owns all
        of its tensors. Raises ``AttributeError`` if there is none."""
        return attrgetter(name)(self.root)

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Put ``value`` under ``name``, as a buffer (made if new), in the layout that a checkpoint gives it back: sums
        over another one differ in their last bits."""
        put_tensor(self.root, name, value.contiguous())
        self._module = None

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and constants that the graph uses, by name, in graph order."""
        names = dict.fromkeys(str(n.target) for n in self.fx.nodes if n.op == "get_attr")
        return {name: self.tensor(name) for name in names}

    def constant(self, node: Any) -> Tensor | None:
        """The tensor of a ``get_attr`` node, ``None`` for anything else."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.tensor(str(node.target))
        return None

    def num_parameters(self) -> int:
        return sum(t.numel() for t in self.tensors().values() if t.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values()), torch.empty(0, device="cpu")).device

    def insert(self, before: fx.Node, target: Any, args: tuple[Any, ...], shape: Sequence[int | None]) -> fx.Node:
        """A call in front of a node, in its module; ``shape``: of what it gives."""
        with self.fx.inserting_before(before):
            made = self.fx.call_function(target, args)
        made.meta = {"module": before.meta.get("module", ""), "shape": tuple(shape), "symbolic": False}
        return made

    def insert_tensor(self, before: fx.Node, name: str, value: Tensor | None = None) -> fx.Node:
        """A tensor, by its name or put under it, to be read in front of a node."""
        if value is not None:
            self.set_tensor(name, value)
        with self.fx.inserting_before(before):
            made = self.fx.get_attr(name)
        shape = tuple(self.tensor(name).shape)
        made.meta = {"module": before.meta.get("module", ""), "shape": shape, "symbolic": False}
        return made

    def change(self, name: str, new: Callable[[Tensor], Tensor]) -> None:
        """Replace a tensor by what ``new`` makes of it in float64, in the type it has."""
        old = self.tensor(name)
        self.set_tensor(name, new(old.to(torch.float64, copy=True)).to(old.dtype))

    def unused(self, stem: str, leaf: str) -> str:
        """A name for a new tensor: ``<stem><leaf>``, with a number between them where the graph reads that already."""
        names, number = {str(n.target) for n in self.fx.nodes if n.op == "get_attr"}, 1
        while (name := f"{stem}{number if number > 1 else ''}{leaf}") in names:
            number += 1
        return name

    # -- copies ---------------------------------------------------------------------------------------------------
    def clone(self, *, share: bool = False) -> "Graph":
        """A copy whose structure and tensors can be changed in any way without touching this one.

        share: hold the same tensors, at no memory, until they are replaced by :meth:`set_tensor`; for those who write
        into none of them.
        """
        tensors = self.tensors()
        if not share:
            tensors = {name: value.detach().clone() for name, value in tensors.items()}
        twin = Graph(tensor_tree(tensors), copy_graph(self.fx), self.structure)
        twin.axes = dict(self.axes)
        twin.train(self.training)
        return twin

    def _apply(self, *args: Any, **kwargs: Any) -> "Graph":
        """What :meth:`to` and its like do."""
        super()._apply(*args, **kwargs)
        moved = args[0]
        self.axes = {name: tuple((moved(t), moved(shift)) for t, shift in steps) for name, steps in self.axes.items()}
        device = self.device
        for node in self.fx.nodes:
            if "device" in node.kwargs:
                node.update_kwarg("device", device)
        self._module = None
        return self

    # -- running --------------------------------------------------------------------------------------------------
    def module(self) -> fx.GraphModule:
        """The graph as compiled Python, made once."""
        if self._module is None:
            self._module = fx.GraphModule(tensor_tree(self.tensors()), copy_graph(self.fx))
        return self._module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns: logits [B, K] of images [B, 3, H, W], or what else :attr:`structure` says."""
        found = self.module()(*self.tensors_of(args, kwargs))
        return self.structure.result(found if isinstance(found, tuple | list) else (found,))

    def tensors_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors among a call's arguments, one for each of :attr:`inputs`. Raises QuantlensError for arguments or
        sizes that the model was not captured with."""
        found = self.structure.tensors(args, kwargs)
        for node, value in zip(self.inputs, found, strict=True):
            wanted = node.meta.get("shape")
            if wanted is None:
                continue
            fits = value.dim() == len(wanted) and all(d in (None, n) for d, n in zip(wanted, value.shape, strict=True))
            if not fits:
                sizes = ", ".join("N" if d is None else str(d) for d in wanted)
                raise QuantlensError(
                    f"{node.target} of shape {list(value.shape)} were given, and this model takes [{sizes}], the size "
                    "that it was captured at: resize them, or quantize the model again at theirs"
                )
        return found

    def run(
        self,
        nodes: Sequence[fx.Node],
        env: dict[fx.Node, Any],
        *,
        hook: EdgeHook | None = None,
        keep: Iterable[fx.Node] = (),
    ) -> dict[fx.Node, Any]:
        """Execute ``nodes`` in order, reading and writing ``env`` (node -> value); values are dropped after their
        last use within ``nodes`` unless they are in ``keep``.

        An input besides the images that is not in ``env`` has the value that the model was captured with.

        ``hook(edge_key, tensor)`` is called on each tensor that crosses an edge of a site (see ``sites``) and returns
        what is used in its place. Weights are not looked up through the hook unless the hook knows their key.
        """
        kept = set(keep)
        last = {source: node for node in nodes for source in node.all_input_nodes}
        edges = self.sites.edges_by_node if hook is not None else {}
        for node in nodes:
            if node.op == "get_attr":
                env[node] = self.tensor(str(node.target))
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(n, env))
            args = list(args)
            for edge in edges.get(node, ()):
                if edge.position is not None:
                    args[edge.position] = hook(edge.key, args[edge.position])  # type: ignore[misc]
            value = node.target(*args, **kwargs)  # type: ignore[operator]
            for edge in edges.get(node, ()):
                if edge.position is None:
                    value = hook(edge.key, value)  # type: ignore[misc]
            env[node] = value
            for source in node.all_input_nodes:
                if last[source] is node and source not in kept and source.op != "placeholder":
                    env.pop(source, None)
        return env

    def _value(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if node in env:
            return env[node]
        if node.op == "get_attr":
            return self.tensor(str(node.target))
        if node.op == "placeholder" and self.structure.example and self.input in env:
            value, images = self.structure.example[self.inputs.index(node)], env[self.input]
            if node.meta["shape"][:1] == (None,):
                value = value[:1].expand(len(images), *value.shape[1:])
            return value.to(images.device)
        if node.meta.get("symbolic"):
            value = node.target(*fx.map_arg(node.args, lambda n: self._value(n, env)))  # type: ignore[operator]
            env[node] = value
            return value
        raise CaptureError(f"internal: the value of {node.name} is not available in this part of the graph")


def on_axes(values: Tensor, factor: Tensor) -> Tensor:
    """Rows of values [N, D] times the transpose of a step's T: factors [D], or orthogonal [n, n] on every n."""
    if factor.dim() == 1:
        return values * factor
    return (values.unflatten(-1, (-1, len(factor))) @ factor.T).flatten(-2)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new


def tensor_tree(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module that holds tensors under their dotted names."""
    root = nn.Module()
    for name, value in tensors.items():
        put_tensor(root, name, value)
    return root


def put_tensor(root: nn.Module, name: str, value: Tensor) -> None:
    """Register ``value`` as a buffer at the dotted ``name`` below ``root``, making containers on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if not isinstance(getattr(root, part, None), nn.Module):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.register_buffer(leaf, value)


def origin(value: Any, through: Collection[str] = VIEWS) -> Any:
    """Where a value comes from, through operations that only move it (or those named)."""
    while op_name(value) in through:
        value = value.args[0]
    return value


def walk(start: Iterable[fx.Node], onward: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """Nodes from ``start`` on, breadth first, each once; ``onward(node)`` gives those that come after a node."""
    queue = list(dict.fromkeys(start))
    seen = set(queue)
    for node in queue:
        yield node
        new = [n for n in dict.fromkeys(onward(node)) if n not in seen]
        queue += new
        seen.update(new)


def coordinates(graph: Graph) -> set[str]:
    """Keys of the edges that carry a detector's boxes and the places where it samples a feature map, back to the layers
    that they are made of: places in the picture, of which a few bits make steps of several pixels, and no features."""
    if graph.boxes is None:
        return set()
    layers = {site.node for site in graph.sites if site.kind != "add"}
    sampled: list[Any] = [node.args[1] for node in graph.fx.nodes if op_name(node) == "aten.grid_sampler.default"]
    made = set(walk([graph.boxes, *sampled], lambda node: () if node in layers else node.all_input_nodes))
    edges = (edge for site in graph.sites if site.node in made for edge in site.edges.values())
    return {edge.key for edge in edges if edge.position is None or edge.node not in layers}
