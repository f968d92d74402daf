"""A module that was captured before is not captured again while its tensors and settings are what they were."""

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantlens.graph.graph import Graph, copy_graph, tensor_tree

_CAPTURED: weakref.WeakKeyDictionary[nn.Module, tuple[str, Graph]] = weakref.WeakKeyDictionary()
"""A person's module -> (fingerprint, graph without the module's own tensors): as long as the module lives."""

_NAMED: OrderedDict[str, Graph] = OrderedDict()
"""Fingerprint -> the graph, likewise, of a model that was loaded by its name: the last that were captured."""
MOST_NAMED = 2


def forget_if_changed(model: Any) -> bool:
    """Drop what was derived from a loaded model whose tensors or settings have changed since; whether they have."""
    key = fingerprint(model.module)
    if model.derived.setdefault("fingerprint", key) == key:
        return False
    model.derived.clear()
    model.derived["fingerprint"] = key
    return True


def captured(owner: nn.Module | str | None, module: nn.Module, inputs: Any, make: Callable[[], Graph]) -> Graph:
    """The graph of ``module``: ``make()``, or the one that was made before of an equal module and inputs of the same
    sizes, with the tensors of this one. owner: the person's module that ``module`` is a copy of, or the name by which
    it was loaded; None: it is captured."""
    if owner is None:
        return make()
    key = fingerprint(module, str(pytree.tree_map(lambda x: x.shape if isinstance(x, Tensor) else x, inputs)))
    if isinstance(owner, str):
        key = f"{key} {owner}"
        known = _NAMED.get(key)
    else:
        found = _CAPTURED.get(owner)
        known = found[1] if found is not None and found[0] == key else None
    if known is not None:
        return clothed(known, module)
    graph = make()
    if isinstance(owner, str):
        _NAMED[key] = bare(graph, module)
        if len(_NAMED) > MOST_NAMED:
            _NAMED.popitem(last=False)
    else:
        _CAPTURED[owner] = (key, bare(graph, module))
    return graph


def bare(graph: Graph, module: nn.Module) -> Graph:
    """A copy of a module's graph without the tensors that are the module's own."""
    own = _tensors(module)
    tensors = {k: torch.empty_like(t, device="meta") if k in own else t for k, t in graph.tensors().items()}
    return Graph(tensor_tree(tensors), copy_graph(graph.fx), graph.structure)


def clothed(graph: Graph, module: nn.Module) -> Graph:
    """A copy of what :func:`bare` gave, with the tensors of an equal module."""
    own = _tensors(module)
    tensors = {k: own[k].detach().contiguous() if t.is_meta else t for k, t in graph.tensors().items()}
    return Graph(tensor_tree(tensors), copy_graph(graph.fx), graph.structure).eval()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def fingerprint(module: nn.Module, inputs: str = "") -> str:
    """A digest of all that a capture depends on: the tensors' values (a write into ``.data`` leaves no other trace),
    the parts, their code, settings and hooks; and the inputs, in words."""
    digest = hashlib.sha256(inputs.encode())
    for name, value in _tensors(module).items():
        _add(digest, name, value)
    for name, part in module.named_modules():
        kind = type(part)
        code = hash(getattr(kind.forward, "__code__", None))  # the same for the same lines in another class
        digest.update(f"\n{name} {kind.__module__}.{kind.__qualname__} {code}".encode())
        for key, value in vars(part).items():
            if isinstance(value, Tensor):
                _add(digest, key, value)
            elif key not in ("_parameters", "_buffers", "_modules", "training"):
                digest.update(f" {key} {_told(value)}".encode())
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Tensor) -> None:
    digest.update(f"\n{name} {value.dtype} {list(value.shape)} {value.device}\n".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _told(value: Any) -> str:
    """A setting in words that are the same for a copy of it."""
    if isinstance(value, FunctionType | MethodType):
        return f"{value.__module__}.{value.__qualname__} {id(getattr(value, '__code__', None))}"
    if isinstance(value, dict | list | tuple | set):
        parts = value.items() if isinstance(value, dict) else value
        return f"{type(value).__name__}({', '.join(_told(part) for part in parts)})"
    plain = isinstance(value, bool | int | float | str | torch.dtype | type(None)) or hasattr(value, "to_dict")
    return repr(value) if plain else type(value).__qualname__
