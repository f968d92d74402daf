"""The network as parts that run alone, one after the other: blocks, and what lies between them; and the values between
these for all calibration images, of the float and of the quantized graph, in bounded memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.calibration import CHUNK, ActivationStore, Calibration, StoredTensor
from quantlens.errors import UnsupportedError
from quantlens.formats import Quantizer
from quantlens.graph import Edge, EdgeHook, Graph, choices, dynamic_nodes, origin


@dataclass(frozen=True)
class Unit:
    """A part of the graph that runs alone: values of ``sources`` in, values of ``results`` out (nearly always one
    each). edges: the edges of its sites. choices: the last of the results, places that the float network chooses for
    the quantized one too (:func:`quantlens.graph.choices`)."""

    name: str
    sources: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...] = field(repr=False)
    edges: tuple[Edge, ...] = field(repr=False)
    choices: tuple[fx.Node, ...] = ()


def find_units(graph: Graph) -> list[Unit]:
    """The whole graph as units in execution order: its blocks, and the stretches before, between and after them,
    named by the first and last layer with a weight."""
    dynamic = dynamic_nodes(graph)
    owner = {node: block.name for block in graph.sites.blocks for node in block.nodes if node in dynamic}
    parts: list[tuple[str, list[fx.Node]]] = []
    places: dict[str, list[fx.Node]] = {}
    for node in graph.fx.nodes:
        if node.op == "call_function" and node in dynamic:
            home = owner.get(node, "")
            if home not in places or (home == "" and parts[-1][0] != ""):
                places[home] = []
                parts.append((home, places[home]))
            places[home].append(node)
    return [_unit(graph, name, nodes, dynamic) for name, nodes in parts]


def whole_network(graph: Graph) -> Unit:
    """The network as one unit, whose results are the logits, the boxes of a detector, and its choices with the scores
    they are made by."""
    dynamic = dynamic_nodes(graph)
    unit = _unit(graph, "", [n for n in graph.fx.nodes if n.op == "call_function" and n in dynamic], dynamic)
    kept = {graph.output, graph.boxes, *unit.choices, *(origin(n).args[0] for n in unit.choices)}
    return replace(unit, name="network", results=tuple(n for n in unit.results if n in kept))


def _unit(graph: Graph, name: str, inside: list[fx.Node], dynamic: set[fx.Node]) -> Unit:
    members = set(inside)
    sources = dict.fromkeys(s for n in inside for s in n.all_input_nodes if s in dynamic and s not in members)
    made = [n for n in choices(graph) if n in members]
    # outside of blocks also the scores that are chosen by: nothing else that is compared depends on them
    scores = set() if name else {origin(n).args[0] for n in made}
    read = (n for n in inside if n is graph.output or n in scores or any(u not in members for u in n.users))
    results = [*(n for n in read if n not in made), *made]
    edges = tuple(e for n in inside for e in graph.sites.edges_by_node.get(n, []))
    if not name:
        layers = list(dict.fromkeys(e.site for e in edges if e.is_weight)) or [inside[0].name, inside[-1].name]
        name = f"{layers[0]}…{layers[-1]}" if len(layers) > 1 else layers[0]
    needed = set(inside)
    # also what does not depend on the pixels, as a class token repeated for the batch
    for node in reversed(graph.fx.nodes):
        if node.op == "call_function" and node not in dynamic and not needed.isdisjoint(node.users):
            needed.add(node)
    nodes = tuple(n for n in graph.fx.nodes if n in needed and not n.meta.get("symbolic"))
    return Unit(name, tuple(sources), tuple(results), nodes, edges, tuple(made))


# -- running them -----------------------------------------------------------------------------------------------------
def run_unit(
    graph: Graph, unit: Unit, env: dict[fx.Node, Any], images: int, hook: EdgeHook | None = None
) -> list[Tensor]:
    """Values of a unit's results; ``env`` holds its sources, and its choices unless it is to make them itself;
    ``images`` is the size of the batch."""
    shape = (images, *graph.input.meta["shape"][1:])
    env.setdefault(graph.input, torch.empty(shape, device="meta"))  # for its batch size alone
    out = graph.run([n for n in unit.nodes if n not in env], env, hook=hook, keep=unit.results)
    return [out[node] for node in unit.results]


def quantized_weights(
    graph: Graph, unit: Unit, quantizers: Mapping[str, Quantizer], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights of a unit by edge key, encoded once, where they have a quantizer or stand in ``tensors`` (by name) for
    the graph's."""
    found: dict[str, Tensor] = {}
    for edge in unit.edges:
        name = str(edge.value.target)
        if edge.is_weight and (edge.key in quantizers or name in tensors):
            weight = tensors[name] if name in tensors else graph.tensor(name)
            found[edge.key] = quantizers[edge.key](weight) if edge.key in quantizers else weight
    return found


def frozen_hook(
    graph: Graph, unit: Unit, quantizers: Mapping[str, Quantizer], tensors: Mapping[str, Tensor] | None = None
) -> EdgeHook:
    """Applies quantizers to the edges of a unit. tensors: see :func:`quantized_weights`."""
    weights = quantized_weights(graph, unit, quantizers, tensors or {})

    def hook(key: str, value: Tensor) -> Tensor:
        if key in weights:
            return weights[key]
        return quantizers[key](value) if key in quantizers else value

    return hook


def random_mask(shape: torch.Size, p: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Bool, True with probability p; drawn on the CPU, so that all devices see the same."""
    return (torch.rand(shape, generator=generator) < p).to(device)


# -- the values between them ------------------------------------------------------------------------------------------
Outputs = dict[fx.Node, StoredTensor]
"""A unit's results for all images, [N, k, …] each: k rows per image (k = 1 but for windows)."""


class Streams:
    """The values between units for all images, of the float graph and of the quantized one. chunks: (first, last + 1)
    of the images that go through a unit together."""

    def __init__(self, graph: Graph, units: list[Unit], calibration: Calibration, store: ActivationStore):
        self.graph, self.store, self.count, self.device = graph, store, calibration.count, graph.device
        self.chunks = [(first, min(first + CHUNK, self.count)) for first in range(0, self.count, CHUNK)]
        self.float: Outputs = {}
        for (first, _), chunk in zip(self.chunks, calibration, strict=True):
            self._put(self.float, graph.input, first, len(chunk), chunk)
        self.quantized = dict(self.float)
        self.last_use = {s: i for i, unit in enumerate(units) for s in (*unit.choices, *unit.sources)}

    def outputs(
        self,
        unit: Unit,
        hook: EdgeHook | None = None,
        constants: Mapping[fx.Node, Tensor] | None = None,
        *,
        original: tuple[Graph, Unit] | None = None,
    ) -> Outputs:
        """The unit's results for all images, of the quantized stream; or of the float one, by the unit's ``original``
        in the float model. constants: what stands in for tensors of the graph."""
        graph, same = original or (self.graph, unit)
        inputs = self.float if original else self.quantized
        found: Outputs = {}
        for first, last in self.chunks:
            pairs = zip(unit.sources, same.sources, strict=True)
            env: dict[fx.Node, Any] = {s: inputs[n].rows(first, last).flatten(0, 1) for n, s in pairs}
            if original is None:
                env |= {n: self.float[n].rows(first, last).flatten(0, 1) for n in unit.choices}
            env.update(constants or {})
            for node, value in zip(unit.results, run_unit(graph, same, env, last - first, hook), strict=True):
                self._put(found, node, first, last - first, value)
        return found

    def _put(self, where: Outputs, node: fx.Node, first: int, images: int, value: Tensor) -> None:
        """Store the value of some images, starting at number ``first``. Raises StorageError for a full disk."""
        if value.shape[0] % images:
            raise UnsupportedError(f"a value of shape {list(value.shape)} cannot be told apart by image")
        value = value.unflatten(0, (images, -1))
        if node not in where:
            where[node] = self.store.empty((self.count, *value.shape[1:]), value.dtype, value.device)
        where[node].write(first, value)

    def forget(self, done: int) -> None:
        """Free what no unit after number ``done`` reads."""
        for stream in (self.float, self.quantized):
            for node in [n for n in stream if self.last_use.get(n, -1) <= done]:
                stream.pop(node).free()

    def inputs(self, unit: Unit, images: Tensor, kind: str, float_share: float, generator: torch.Generator) -> dict:
        """The unit's sources for a mini-batch: of the "quantized" or the "float" stream, or "mixed", element by element
        (the float one with probability ``float_share``); and its choices."""
        env: dict[fx.Node, Any] = {node: self.float[node].pick(images).flatten(0, 1) for node in unit.choices}
        for node in unit.sources:
            same = self.quantized[node] is self.float[node]
            stream = self.float if kind == "float" or same else self.quantized
            env[node] = stream[node].pick(images).flatten(0, 1)
            if kind == "mixed" and not same:
                exact = self.float[node].pick(images).flatten(0, 1)
                env[node] = torch.where(random_mask(exact.shape, float_share, generator, self.device), exact, env[node])
        return env
