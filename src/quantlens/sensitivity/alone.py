"""What one site, or one block, does to the output when it alone is quantized.

The float model runs once on the images, a few at a time. Where a part begins, the values that wait there are its cached
input: the part is run from there with its own quantizers, to the end of its block. The results of several parts of one
block are then stacked along the batch, and what is left of the model runs once for all of them. Nothing in front of a
part is ever computed for it, and the effects are those of whole forwards of the model with that part quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.calibration import CHUNK, Calibration
from quantlens.formats import Quantizer
from quantlens.graph import Edge, Graph
from quantlens.graph.graph import op_name
from quantlens.graph.sites import dynamic_nodes
from quantlens.methods.base import Progress
from quantlens.metrics.divergence import kl_of_logits, sqnr_db
from quantlens.sensitivity.graph_parts import Ahead, Hook, part_between, visit_starts

ROWS = {"cpu": 8}
MANY_ROWS = 256
"""Images of all variants together that go through the rest of the model at once, by kind of device: a CPU core is busy
with few, whose activations stay in its cache; an accelerator is not."""


@dataclass(frozen=True)
class Effect:
    """What quantizing one part does to the logits.

    sqnr_db: 10·log₁₀(Σ z² / Σ (z − ẑ)²) over all images and classes, z the float model's logits; None where nothing
    changes. kl: mean KL(softmax z ‖ softmax ẑ), nats per image. changed: share of images whose top class changes.
    """

    sqnr_db: float | None
    kl: float
    changed: float


def effects_alone(
    graph: Graph,
    quantizers: Mapping[str, Quantizer],
    parts: Sequence[Sequence[str]],
    calibration: Calibration,
    *,
    rows: int | None = None,
    progress: Progress | None = None,
) -> list[Effect]:
    """The effect of each part alone.

    quantizers: edge key -> quantizer. parts: keys of the quantizers that act together (those of a site, of a block).
    rows: images of all variants together in one pass over the rest of the model (default: :data:`ROWS`); no more images
    than that, and than a chunk, go through the model at once.
    """
    rows = rows or ROWS.get(graph.device.type, MANY_ROWS)
    run = _Run(graph, quantizers, parts, rows)
    with torch.no_grad():
        visit_starts(graph, run.nodes, calibration, run.visit, progress, at_once=min(rows, CHUNK))
        run.flush()
    return run.tally.effects(len(calibration))


class _Run:
    """One pass over the images. Variants of one chunk wait at the end of their block until they are enough."""

    def __init__(self, graph: Graph, quantizers: Mapping[str, Quantizer], parts: Sequence[Sequence[str]], rows: int):
        edges = graph.sites.edges
        self.graph, self.quantizers, self.rows = graph, quantizers, rows
        self.edges: list[list[Edge]] = [[edges[key] for key in keys] for keys in parts]
        self.nodes = [list(dict.fromkeys(edge.node for edge in part)) for part in self.edges]
        self.tally = _Tally(len(parts), graph.device)
        self._ends = _Ends(graph)
        self._after = [self._ends.after(part) for part in self.nodes]
        self._weights: dict[str, Tensor] = {}
        self._images: Tensor | None = None
        self._expected: Tensor | None = None
        self._waiting: list[tuple[int, Tensor]] = []
        self._place: fx.Node | None = None

    def visit(self, part: int, env: dict[fx.Node, Any], ahead: Ahead) -> None:
        """Run one variant to the end of its block."""
        images, end = env[self.graph.input], self._after[part]
        if images is not self._images:
            self.flush()
            self._images = images
            self._expected = self._run(env, self.graph.output, None)
            self.tally.expect(self._expected)
        if end is not self._place or (len(self._waiting) + 1) * len(images) > self.rows:
            self.flush()
        self._place = end
        self._waiting.append((part, self._run(env, end, self._hook(part))))

    def flush(self) -> None:
        """Take the variants that wait to the output together, and note what they do there."""
        if not self._waiting or self._place is None or self._expected is None or self._images is None:
            return
        numbers, values = zip(*self._waiting, strict=True)
        stacked = values[0] if len(values) == 1 else torch.cat(values)
        self._waiting = []
        if self._place is not self.graph.output:
            shape = (len(numbers) * len(self._images), *self._images.shape[1:])
            pixels = torch.empty(shape, device="meta")  # for its batch size alone
            stacked = self._run({self._place: stacked, self.graph.input: pixels}, self.graph.output, None)
        for number, logits in zip(numbers, stacked.chunk(len(numbers)), strict=True):
            self.tally.add(number, self._expected, logits)

    def _run(self, env: dict[fx.Node, Any], end: fx.Node, hook: Hook | None) -> Tensor:
        nodes = part_between(self.graph, env, [end])
        return self.graph.run(nodes, dict(env), hook=hook, keep=[end])[end]

    def _hook(self, part: int) -> Hook:
        """Applies the quantizers of one part; every weight is quantized once."""
        own = {edge.key: edge for edge in self.edges[part]}
        for edge in own.values():
            if edge.is_weight and edge.key not in self._weights:
                self._weights[edge.key] = self.quantizers[edge.key](self.graph.tensor(str(edge.value.target)))

        def apply(key: str, value: Tensor) -> Tensor:
            if key not in own:
                return value
            return self._weights[key] if own[key].is_weight else self.quantizers[key](value)

        return apply


class _Ends:
    """The places where one tensor [B, …] is all that the rest of the model needs: ends of blocks, and the output."""

    def __init__(self, graph: Graph):
        self._order = {node: i for i, node in enumerate(graph.fx.nodes)}
        dynamic = dynamic_nodes(graph)
        around = dict.fromkeys(node for block in graph.sites.blocks for node in (block.source, block.result))
        found = [node for node in around if self._suffices(graph, node, dynamic)]
        self._ends = sorted({*found, graph.output}, key=self._order.__getitem__)

    def _suffices(self, graph: Graph, end: fx.Node, dynamic: set[fx.Node]) -> bool:
        if end.op != "call_function":
            return False
        rest = part_between(graph, {end: None, graph.input: None}, [graph.output])
        return all(
            self._order[node] > self._order[end] and graph.input not in node.all_input_nodes
            for node in rest
            if node in dynamic and not op_name(node).startswith("aten.sym_size")
        )

    def after(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """The first such place at or after all of ``nodes``."""
        last = max(self._order[node] for node in nodes)
        return next(end for end in self._ends if self._order[end] >= last or end is self._ends[-1])


class _Tally:
    """Sums over the images, float64, on the device until they are asked for."""

    def __init__(self, parts: int, device: torch.device):
        self.signal = torch.zeros((), dtype=torch.float64, device=device)
        self.noise, self.kl, self.changed = (torch.zeros(parts, dtype=torch.float64, device=device) for _ in range(3))

    def expect(self, logits: Tensor) -> None:
        self.signal += logits.double().square().sum()

    def add(self, part: int, expected: Tensor, logits: Tensor) -> None:
        self.noise[part] += (logits.double() - expected.double()).square().sum()
        self.kl[part] += kl_of_logits(expected.double(), logits.double()).sum()
        self.changed[part] += (logits.argmax(-1) != expected.argmax(-1)).sum()

    def effects(self, images: int) -> list[Effect]:
        signal = float(self.signal)
        noise, kl, changed = self.noise.tolist(), (self.kl / images).tolist(), (self.changed / images).tolist()
        return [Effect(sqnr_db(signal, n), k, c) for n, k, c in zip(noise, kl, changed, strict=True)]
