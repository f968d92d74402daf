"""Small models changed so that something about them must matter, and what crosses their edges."""

from __future__ import annotations

from quantlens.graph import graph_of


def changed(model, change):
    """A model (fixture ``fresh``) whose graph's tensors are changed in place by ``change(tensors by name)``."""
    change(graph_of(model).tensors())
    return model


def values(graph, images):
    """Float values by edge key."""
    seen = {}
    calls = [node for node in graph.fx.nodes if node.op == "call_function"]
    graph.run(calls, {graph.input: images}, hook=lambda key, x: seen.setdefault(key, x), keep=[graph.output])
    return seen


def rows_of(x):
    """[..., k] as [n, k]."""
    return x.flatten(0, -2)


def energy(x) -> float:
    """Sum of squares."""
    return float(x.double().square().sum())
