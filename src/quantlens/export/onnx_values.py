"""What export must know of every value of a graph: whether it is float, int or bool, and its sizes as the batch has
them. Found by running the graph without data at two batch sizes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from quantlens.errors import UnsupportedError
from quantlens.graph.graph import Graph, op_name

BATCHES = (5, 7)
"""Two batch sizes that no size of a model is likely to equal by chance."""


@dataclass(frozen=True)
class Size:
    """A size that follows the batch: ``per_image * batch + fixed``."""

    per_image: int
    fixed: int = 0


class Value(NamedTuple):
    """What a tensor is: "float", "int" or "bool" (a file has one type of each), and its sizes."""

    kind: str
    shape: tuple[Any, ...]


def kind_of(dtype: torch.dtype) -> str:
    """Raises UnsupportedError for complex numbers."""
    if dtype.is_complex:
        raise UnsupportedError("export has no complex numbers")
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int"


def is_size(node: fx.Node) -> bool:
    """Whether a node gives a size, and no tensor."""
    return bool(node.meta.get("symbolic")) or op_name(node).startswith("aten.sym_size")


def constants(graph: Graph) -> dict[fx.Node, Any]:
    """Operations that depend on no input -> what they give."""
    known: dict[fx.Node, Any] = {}
    found: dict[fx.Node, Any] = {}
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            known[node] = graph.constant(node)
        elif node.op == "call_function" and not is_size(node) and all(n in known for n in node.all_input_nodes):
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = found[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return found


def fixed(graph: Graph) -> set[fx.Node]:
    """What depends on nothing of the inputs but the size of the batch."""
    found: set[fx.Node] = set()
    for node in graph.fx.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and all(n in found or is_size(n) for n in node.all_input_nodes)
        ):
            found.add(node)
    return found


def values(graph: Graph, known: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Node -> :class:`Value`, a list of them for an operation that gives several, a number or :class:`Size` for a size.

    known: :func:`constants`. Raises UnsupportedError, naming the operation, where a size depends on what is in the
    images.
    """
    first, second = (_run(graph, batch, known) for batch in BATCHES)
    found = {}
    for node, value in first.items():
        try:
            found[node] = _both(value, second[node])
        except UnsupportedError as error:
            raise UnsupportedError(f"export cannot write {described(node)}: {error}") from None
    return found


def described(node: fx.Node) -> str:
    """An operation and where it is, for sentences."""
    return f"{op_name(node)} ({node.meta.get('module') or 'the model'})"


def _run(graph: Graph, batch: int, known: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )

    env: dict[fx.Node, Any] = {}
    device = next((tensor.device for tensor in graph.tensors().values()), torch.device("cpu"))
    picked = {node: count for node in graph.fx.nodes if (count := _picked(graph, node)) is not None}
    with FakeTensorMode() as mode, torch.no_grad():
        for node in graph.fx.nodes:
            if node.op == "placeholder":
                sizes = [batch if d is None else d for d in node.meta["shape"]]
                env[node] = torch.empty(sizes, dtype=node.meta.get("dtype") or torch.float32, device=device)
            elif node in picked:
                env[node] = torch.empty(picked[node], dtype=torch.int64, device=device)
            elif node.op == "get_attr" or node in known:
                held = known[node] if node in known else graph.tensor(str(node.target))
                env[node] = tree_map_only(Tensor, mode.from_tensor, held)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                try:
                    env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                except (DataDependentOutputException, DynamicOutputShapeException):
                    raise UnsupportedError(
                        f"export cannot write {described(node)}: its size depends on what is in the images"
                    ) from None
    return env


def _picked(graph: Graph, index: fx.Node) -> int | None:
    """How many a mask in the model picks that indexes a tensor; None for what is no such mask."""
    held = graph.constant(index)
    if held is None or held.dtype != torch.bool or {op_name(user) for user in index.users} != {"aten.index.Tensor"}:
        return None
    return int(held.sum()) if held.dim() == 1 else None


def _both(a: Any, b: Any) -> Any:
    """What is known of a value that was found at both batch sizes."""
    if isinstance(a, Tensor):
        return Value(kind_of(a.dtype), tuple(map(_both, a.shape, b.shape)))
    if isinstance(a, list | tuple):
        return [_both(x, y) for x, y in zip(a, b, strict=True)]
    if isinstance(a, bool) or not isinstance(a, int) or a == b:
        return a
    per_image, rest = divmod(b - a, BATCHES[1] - BATCHES[0])
    if rest:
        raise UnsupportedError("its size is no multiple of the batch")
    return Size(per_image, a - per_image * BATCHES[0])
