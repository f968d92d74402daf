"""The network as parts that run alone, one after the other: blocks, and what lies between them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from quantlens.graph import Edge, Graph
from quantlens.graph.sites import dynamic_nodes


@dataclass(frozen=True)
class Unit:
    """A part of the graph that runs alone: values of ``sources`` in, values of ``results`` out (nearly always one
    each). edges: the edges of its sites."""

    name: str
    sources: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...] = field(repr=False)
    edges: tuple[Edge, ...] = field(repr=False)


def find_units(graph: Graph) -> list[Unit]:
    """The whole graph as units in execution order: its blocks, and the stretches before, between and after them,
    named by the first and last layer with a weight."""
    dynamic = dynamic_nodes(graph)
    owner = {node: block.name for block in graph.sites.blocks for node in block.nodes if node in dynamic}
    parts: list[tuple[str, list[fx.Node]]] = []
    places: dict[str, list[fx.Node]] = {}
    for node in graph.fx.nodes:
        if node.op != "call_function" or node not in dynamic:
            continue
        home = owner.get(node)
        if home is not None:
            if home not in places:
                places[home] = []
                parts.append((home, places[home]))
            places[home].append(node)
        else:
            if not parts or parts[-1][0] in places:
                parts.append(("", []))
            parts[-1][1].append(node)
    of_node = graph.sites.edges_by_node
    units = []
    for name, inside in parts:
        members = set(inside)
        sources = dict.fromkeys(s for n in inside for s in n.all_input_nodes if s in dynamic and s not in members)
        results = [n for n in inside if n is graph.output or any(u not in members for u in n.users)]
        edges = tuple(e for n in inside for e in of_node.get(n, []))
        layers = list(dict.fromkeys(e.site for e in edges if e.is_weight))
        title = name or (f"{layers[0]}…{layers[-1]}" if len(layers) > 1 else "".join(layers))
        if not title:
            title = f"{inside[0].name}…{inside[-1].name}"
        nodes = tuple(sorted({*inside, *_constant_parents(inside, dynamic)}, key=_order(graph).__getitem__))
        units.append(Unit(title, tuple(sources), tuple(results), nodes, edges))
    return units


def _order(graph: Graph) -> dict[fx.Node, int]:
    return {node: i for i, node in enumerate(graph.fx.nodes)}


def _constant_parents(nodes: list[fx.Node], dynamic: set[fx.Node]) -> set[fx.Node]:
    """Operations that ``nodes`` need and that do not depend on the pixels (a class token repeated for the batch)."""
    found: set[fx.Node] = set()
    queue = list(nodes)
    while queue:
        for source in queue.pop().all_input_nodes:
            if source.op == "call_function" and source not in dynamic and source not in found:
                if not source.meta.get("symbolic"):
                    found.add(source)
                queue.append(source)
    return found
