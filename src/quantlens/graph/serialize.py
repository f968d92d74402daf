"""A graph as plain data and back, so that a checkpoint describes itself and needs neither timm nor the model's class.

Nothing in the data is executed: an operation is looked up by name among ATen's, and only those without side effects
are accepted.
"""

import math
import operator
import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlens.errors import BadWeightsError
from quantlens.graph.graph import Graph, put_tensor
from quantlens.graph.structure import Structure

_ATEN = re.compile(r"aten\.([a-z_0-9]+)\.([A-Za-z_0-9]+)")
_REFUSED = {"from_file", "_print", "set_data"}
_PYTHON = {
    f"python.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "getitem", "truediv")
}
"""Plain Python functions that may stand in a graph (sizes computed from the batch); anything else is an ATen
operation."""
_NAMES = {function: name for name, function in _PYTHON.items()}
_ENUMS = {str(v): v for v in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.strided)}


def graph_to_dict(graph: Graph) -> list[dict[str, Any]]:
    """Nodes in order, as JSON-able data."""
    return [
        {
            "op": node.op,
            "name": node.name,
            "target": _NAMES.get(node.target, str(node.target)),
            "args": _encode(node.args),
            "kwargs": {k: _encode(v) for k, v in node.kwargs.items() if k != "device"},
            "module": node.meta.get("module", ""),
            "shape": list(node.meta["shape"]) if node.meta.get("shape") is not None else None,
            "symbolic": bool(node.meta.get("symbolic", False)),
        }
        for node in graph.fx.nodes
    ]


def graph_from_dict(
    nodes: list[dict[str, Any]], tensors: dict[str, Tensor], structure: dict[str, Any] | None = None
) -> Graph:
    """The inverse of :func:`graph_to_dict`; ``tensors`` holds every parameter the nodes name. structure: that of the
    graph as plain data, None for images -> logits.

    Raises BadWeightsError for anything that is not a plain graph of known operations.
    """
    root, graph = nn.Module(), fx.Graph()
    made: dict[str, fx.Node] = {}
    for item in nodes:
        op, target = item["op"], item["target"]
        if op == "get_attr":
            if target not in tensors:
                raise BadWeightsError(
                    f"the checkpoint names the tensor {target!r} but does not hold it; the file is damaged"
                )
            put_tensor(root, target, tensors[target])
        elif op == "call_function":
            target = _target(target)
        elif op not in ("placeholder", "output"):
            raise BadWeightsError(f"the checkpoint's graph holds an unknown kind of node {op!r}")
        args, kwargs = _decode(item["args"], made), {k: _decode(v, made) for k, v in item["kwargs"].items()}
        if op == "output":  # several tensors are a tuple, which JSON does not know
            args = [tuple(args[0]) if isinstance(args[0], list) else args[0]]
        node = graph.create_node(op, target, tuple(args), kwargs)
        shape = item["shape"]
        node.meta = {
            "module": item["module"],
            "shape": tuple(shape) if shape is not None else None,
            "symbolic": item["symbolic"],
        }
        made[item["name"]] = node
    result = Graph(root, graph, Structure.from_dict(structure))
    result.eval()
    return result


def _target(name: str) -> Any:
    if name in _PYTHON:
        return _PYTHON[name]
    match = _ATEN.fullmatch(name)
    if match is None or match[1] in _REFUSED:
        raise BadWeightsError(f"the checkpoint's graph uses the operation {name!r}, which is not allowed")
    try:
        operation = getattr(getattr(torch.ops.aten, match[1]), match[2])
    except AttributeError as error:
        raise BadWeightsError(f"this torch has no operation {name!r}, which the checkpoint's graph uses") from error
    if operation._schema.is_mutable:
        raise BadWeightsError(f"the checkpoint's graph uses the operation {name!r}, which has side effects")
    return operation


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format | torch.layout):
        return {"enum": str(value)}
    if isinstance(value, slice):
        return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, float) and math.isinf(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise BadWeightsError(f"a graph argument of type {type(value).__name__} cannot be saved")


def _decode(value: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, made) for v in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "node":
        if content not in made:
            raise BadWeightsError(f"the checkpoint's graph reads {content!r} before it is made; the file is damaged")
        return made[content]
    if kind == "dtype" and isinstance(getattr(torch, str(content), None), torch.dtype):
        return getattr(torch, content)
    if kind == "enum" and content in _ENUMS:
        return _ENUMS[content]
    if kind == "slice":
        return slice(*(_decode(v, made) for v in content))
    if kind == "float":
        return float(content)
    raise BadWeightsError(f"the checkpoint's graph holds a value that is not understood: {kind!r}")
