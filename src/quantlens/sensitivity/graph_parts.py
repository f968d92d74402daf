"""Parts of a graph run alone: each chunk of images goes through the float model once, and where a part begins, the
values that wait there are the input from which the part is run again, as often as it takes. No candidate costs a
forward of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from quantlens.calibration import CHUNK, Calibration
from quantlens.graph import Graph
from quantlens.methods.base import Progress

Hook = Callable[[str, Tensor], Tensor]
Ahead = Callable[[Iterable[fx.Node]], dict[fx.Node, Any]]
Visit = Callable[[int, dict[fx.Node, Any], Ahead], None]


def visit_starts(
    graph: Graph,
    parts: Sequence[Sequence[fx.Node]],
    calibration: Calibration,
    visit: Visit,
    progress: Progress | None = None,
    *,
    at_once: int = CHUNK,
) -> None:
    """Take every chunk of images through the float model once, and call ``visit(number of the part, env, ahead)``
    where a part of the graph, given by its nodes, begins.

    env: node -> value, all that the rest of the model needs at this point (a dictionary of the visitor's own).
    ahead(targets) runs the float model on to some later nodes and gives their values; it is called at most once.
    at_once: images that go through the model together, at most a chunk.
    """
    order = [node for node in graph.fx.nodes if node.op in ("placeholder", "call_function")]
    place = {node: i for i, node in enumerate(order)}
    starts = sorted((min(place[node] for node in part), number) for number, part in enumerate(parts))
    total, done = len(calibration) * len(starts), 0
    for images in (piece for chunk in calibration for piece in chunk.split(at_once)):
        float_pass = _FloatPass(graph, order, place, images)
        for start, number in starts:
            float_pass.advance(start)
            # branches that run side by side: nothing that the part itself makes may be there already
            env = {node: value for node, value in float_pass.env.items() if place[node] < start}
            visit(number, env, float_pass.ahead)
            done += len(images)
            if progress is not None:
                progress(done, total)


class _FloatPass:
    """The float model on one chunk of images, run as far as it was asked to; ``env`` holds what the rest needs."""

    def __init__(self, graph: Graph, order: list[fx.Node], place: dict[fx.Node, int], images: Tensor):
        self.graph, self.order, self.place = graph, order, place
        self.env: dict[fx.Node, Any] = {graph.input: images}
        self._reached = 0
        self._last_use = {source: i for i, node in enumerate(order) for source in node.all_input_nodes}
        self._last_use |= dict.fromkeys([graph.input, graph.output], len(order))

    def advance(self, to: int, extra: Iterable[fx.Node] = ()) -> None:
        """Run up to operation number ``to``; values that nothing later reads are dropped unless in ``extra``."""
        if to <= self._reached:
            return
        part = [node for node in self.order[self._reached : to] if node.op == "call_function"]
        alive = {n for n in [*self.env, *part] if self._last_use.get(n, -1) >= to} | set(extra)
        self.graph.run(part, self.env, keep=alive)
        self.env = {node: value for node, value in self.env.items() if node in alive}
        self._reached = to

    def ahead(self, targets: Iterable[fx.Node]) -> dict[fx.Node, Any]:
        """Run on to the last of ``targets``; their values."""
        wanted = list(targets)
        self.advance(max(self.place[node] for node in wanted) + 1, wanted)
        passed = [node for node in wanted if node not in self.env]
        again = self.graph.run(part_between(self.graph, self.env, passed), dict(self.env), keep=passed)
        return {node: again[node] for node in wanted}


def part_between(graph: Graph, env: dict[fx.Node, Any], targets: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes that must run, in graph order, to make ``targets`` from what ``env`` holds."""
    queue, needed = list(targets), set()
    while queue:
        node = queue.pop()
        if node.op == "call_function" and node not in env and node not in needed:
            needed.add(node)
            queue.extend(node.all_input_nodes)
    return [node for node in graph.fx.nodes if node in needed]
