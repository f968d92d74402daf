"""What does not depend on the images is computed once, when a model is captured.

A value may depend on the batch size and still say the same about every image (a class token for each image, the mask of
an attention): it is computed for one image, and expanded to the batch.
"""

from typing import Any

import torch
from torch import Tensor, fx

from quantlens.errors import CaptureError
from quantlens.graph.graph import Graph, argument, op_name

aten = torch.ops.aten

REPEATS = {"aten.expand.default", "aten.repeat.default"}
BATCHES = (2, 3)
"""Batch sizes that values are computed for: what differs between them is the batch."""


def fold_constants(graph: Graph) -> None:
    """Put what depends on parameters and sizes alone under names like ``<parameter>_folded``."""
    graph.fx.eliminate_dead_code()
    small = _Values(graph, BATCHES[0])
    large = _Values(graph, BATCHES[1], small)
    read: set[fx.Node] = set()  # by an operation that stays
    for node in reversed(list(graph.fx.nodes)):
        if node not in small.of or node.meta.get("symbolic"):
            read.update(node.all_input_nodes)
        elif node in read and node.op == "call_function":
            new = _folded(graph, node, small, large)
            if new is None:
                read.update(node.all_input_nodes)
            else:
                node.replace_all_uses_with(new)
    graph.fx.eliminate_dead_code()


def is_random(node: fx.Node) -> bool:
    """Whether an operation draws numbers; what only does so in training (a recurrent layer's dropout) does not."""
    return (
        torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and argument(node, "train") is not False
    )


def refuse_random_numbers(graph: Graph) -> None:
    """Raises CaptureError for a model that draws random numbers."""
    for node in graph.fx.nodes:
        if is_random(node):
            raise CaptureError(
                f"{node.meta.get('module') or 'the model'} draws random numbers in evaluation mode ({op_name(node)}): "
                "give them as an input if the model takes one, such as [{'pixel_values': images, 'noise': noise}]"
            )


class _Values:
    """The values that do not depend on the images, for one batch size. of: node -> value. name: node -> a parameter it
    is made of. varies: nodes that the batch size goes into; what does not vary is taken from ``known``."""

    def __init__(self, graph: Graph, batch: int, known: "_Values | None" = None):
        self.of: dict[fx.Node, Any] = {}
        self.name: dict[fx.Node, str] = {}
        self.varies: set[fx.Node] = set()
        with torch.no_grad():
            for node in graph.fx.nodes:
                self._visit(graph, node, batch, known)

    def _visit(self, graph: Graph, node: fx.Node, batch: int, known: "_Values | None") -> None:
        sources = node.all_input_nodes
        if known is not None and node in known.of and node not in known.varies:
            self.of[node] = known.of[node]
        elif node.op == "get_attr":
            self.of[node], self.name[node] = graph.tensor(str(node.target)), str(node.target)
        elif node.meta.get("is_batch"):
            self.of[node] = batch
            self.varies.add(node)
        elif node.op == "call_function" and all(s in self.of for s in sources) and not is_random(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.of.__getitem__)
            self.of[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            named = [s for s in sources if s in self.name]
            floats = [s for s in named if isinstance(self.of[s], Tensor) and self.of[s].is_floating_point()]
            module = node.meta.get("module", "")
            self.name[node] = (
                self.name[(floats or named)[0]] if named else f"{module}.constant" if module else "constant"
            )
            if not self.varies.isdisjoint(sources):
                self.varies.add(node)


def _folded(graph: Graph, node: fx.Node, small: _Values, large: _Values) -> fx.Node | None:
    """A node that gives a constant's value; None where the operation must stay (it gives no tensor, or another one for
    every batch size), or repeats a constant already."""
    value, other = small.of[node], large.of[node]
    if not isinstance(value, Tensor):
        return None
    name = graph.unused(f"{small.name[node]}_folded", "")
    if node not in small.varies or (value.shape == other.shape and torch.equal(value, other)):
        return graph.insert_tensor(node, name, value.contiguous().clone())
    if op_name(node) in REPEATS and node.args[0] not in small.varies:
        return None
    dims = [d for d in range(value.dim()) if value.dim() == other.dim() and value.shape[d] != other.shape[d]]
    if len(dims) != 1 or other.shape[dims[0]] * BATCHES[0] != value.shape[dims[0]] * BATCHES[1]:
        return None
    (dim,) = dims
    one = [v.unflatten(dim, (batch, -1)) for v, batch in zip((value, other), BATCHES, strict=True)]
    row = one[0].narrow(dim, 0, 1)
    if not all(torch.equal(v, row.expand_as(v)) for v in one):
        return None
    size = next(n for n in graph.fx.nodes if n.meta.get("is_batch"))
    whole = row.shape[dim + 1] > 1
    row = (row if whole else row.squeeze(dim + 1)).contiguous().clone()
    constant = graph.insert_tensor(node, name, row)
    sizes = [size if d == dim else n for d, n in enumerate(row.shape)]
    shape = [None if d == dim else n for d, n in enumerate(row.shape)]
    new = graph.insert(node, aten.expand.default, (constant, sizes), shape)
    return graph.insert(node, aten.flatten.using_ints, (new, dim, dim + 1), node.meta["shape"]) if whole else new
