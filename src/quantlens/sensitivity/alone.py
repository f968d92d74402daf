"""What one site, or one block, does to the output when it alone is quantized.

The float model runs once on the images, a few at a time. Where a part begins, the values that wait there are its cached
input: the part is run from there with its own quantizers, to the end of its block. The results of several parts of one
block are then stacked along the batch, and what is left of the model runs once for all of them. Nothing in front of a
part is ever computed for it, and the effects are those of whole forwards of the model with that part quantized, but
that its queries are those that the float model chooses (:func:`quantlens.graph.choices`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.calibration import CHUNK, Calibration
from quantlens.formats import Quantizer
from quantlens.graph import Graph, choices, dynamic_nodes, op_name
from quantlens.methods.base import Progress
from quantlens.metrics.detection import CONFIDENT
from quantlens.metrics.divergence import OutputKind, as_choices, box_error, box_iou, kl_of_logits, objects_of, sqnr_db

Hook = Callable[[str, Tensor], Tensor]
Ahead = Callable[[Iterable[fx.Node]], dict[fx.Node, Any]]
Visit = Callable[[int, dict[fx.Node, Any], Ahead], None]

ROWS = {"cpu": 8}
MANY_ROWS = 256
"""Images of all variants together that go through the rest of the model at once, by kind of device: a CPU core is busy
with few, whose activations stay in its cache; an accelerator is not."""


@dataclass(frozen=True)
class Effect:
    """What quantizing one part does to the logits.

    sqnr_db: 10·log₁₀(Σ z² / Σ (z − ẑ)²) over all images and classes, z the float model's logits; None where nothing
    changes. kl: mean KL(softmax z ‖ softmax ẑ), nats per image, of sigmoids the sum over labels. changed: share of
    images whose top class, or one of whose labels, changes. Both None of a model that gives features.

    Of a detector: noise is the mean of that of the logits and of the boxes, each relative to its own signal; kl and
    changed are means over queries, and the boxes' :func:`.box_error` is added to kl. matched_iou: mean IoU of the
    boxes with the float model's, 0 where the class is another, of the queries that are sure of an object; or None.
    """

    sqnr_db: float | None
    kl: float | None
    changed: float | None
    matched_iou: float | None = None


def effects_alone(
    graph: Graph,
    quantizers: Mapping[str, Quantizer],
    parts: Sequence[Sequence[str]],
    calibration: Calibration,
    *,
    outputs: OutputKind = "softmax",
    rows: int | None = None,
    progress: Progress | None = None,
) -> list[Effect]:
    """The effect of each part alone.

    quantizers: edge key -> quantizer. parts: keys of the quantizers that act together (those of a site, of a block).
    outputs: what the model gives; values, such as features, have neither `kl` nor `changed`.
    rows: images of all variants together in one pass over the rest of the model (default: :data:`ROWS`); no more images
    than that, and than a chunk, go through the model at once.
    """
    with torch.no_grad():
        run = _Run(graph, quantizers, parts, rows or ROWS.get(graph.device.type, MANY_ROWS), outputs == "sigmoid")
        visit_starts(graph, run.nodes, calibration, run.visit, progress, at_once=min(run.rows, CHUNK))
        run.flush()
    images, classes = len(calibration), outputs != "values"
    iou = (run.iou / run.sure).tolist() if bool(run.sure.all()) else [None] * len(parts)
    if graph.boxes is None:
        signal, noise = float(run.signal[0]), run.noise[:, 0].tolist()
    else:
        signal, noise = 1.0, (run.noise / run.signal.clamp_min(1e-30)).mean(1).tolist()
    means = zip(noise, (run.kl / images).tolist(), (run.changed / images).tolist(), iou, strict=True)
    found = [Effect(sqnr_db(signal, n), kl, changed, o) for n, kl, changed, o in means]
    return found if classes else [replace(effect, kl=None, changed=None) for effect in found]


class _Run:
    """One pass over the images. Variants of one chunk wait at the end of their block until they are enough."""

    def __init__(
        self,
        graph: Graph,
        quantizers: Mapping[str, Quantizer],
        parts: Sequence[Sequence[str]],
        rows: int,
        sigmoid: bool,
    ):
        self.graph, self.quantizers, self.parts, self.rows, self.sigmoid = graph, quantizers, parts, rows, sigmoid
        edges = graph.sites.edges
        self.nodes = [list(dict.fromkeys(edges[key].node for key in keys)) for keys in parts]
        weights = [edges[key] for key in dict.fromkeys(chain.from_iterable(parts)) if edges[key].is_weight]
        self._weights = {e.key: quantizers[e.key](graph.tensor(str(e.value.target))) for e in weights}
        self._ends = block_ends(graph, self.nodes)
        self._outputs, self._choices = measured(graph), choices(graph)
        self._waiting: list[tuple[int, list[Tensor]]] = []
        self._images: Any = None
        self._expected: Any = None
        self._chosen: dict[fx.Node, Tensor] = {}
        self._place: Any = None
        self.signal = torch.zeros(len(self._outputs), dtype=torch.float64, device=graph.device)
        self.noise = self.signal.new_zeros(len(parts), len(self._outputs))
        self.kl, self.changed, self.iou, self.sure = self.signal.new_zeros(4, len(parts)).unbind()

    def visit(self, part: int, env: dict[fx.Node, Any], ahead: Ahead) -> None:
        """Run one variant to the end of its block."""
        images, end = env[self.graph.input], self._ends[part]
        if images is not self._images:
            self.flush()
            self._images, self._expected = images, [x.double() for x in self._run(env, self._outputs)]
            self._chosen = {node: env[node] for node in self._choices}
            self.signal += torch.stack([x.square().sum() for x in self._expected])
        if end is not self._place or (len(self._waiting) + 1) * len(images) > self.rows:
            self.flush()
        self._place = end
        self._waiting.append((part, self._run(env, self._until(end), self._hook(part))))

    def _until(self, end: fx.Node) -> list[fx.Node]:
        """What is computed up to the end of a block; all that is measured at the end of the model."""
        return self._outputs if end is self.graph.output else [end]

    def flush(self) -> None:
        """Take the variants that wait to the output together, and add up what they do there."""
        if not self._waiting:
            return
        numbers, values = zip(*self._waiting, strict=True)
        stacked = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*values, strict=True)]
        self._waiting = []
        if self._place is not self.graph.output:
            shape = (len(numbers) * len(self._images), *self._images.shape[1:])
            pixels = torch.empty(shape, device="meta")  # for its batch size alone
            chosen = {node: torch.cat([places] * len(numbers)) for node, places in self._chosen.items()}
            stacked = self._run({**chosen, self._place: stacked[0], self.graph.input: pixels}, self._outputs)
        pieces = zip(*(value.double().chunk(len(numbers)) for value in stacked), strict=True)
        for part, found in zip(numbers, pieces, strict=True):
            self._measure(part, found)

    def _measure(self, part: int, found: Sequence[Tensor]) -> None:
        """Add up what a variant's outputs differ by."""
        pairs = list(zip(self._expected, found, strict=True))
        self.noise[part] += torch.stack([(got - expected).square().sum() for expected, got in pairs])
        before, after = (as_choices(z) if self.sigmoid else z for z in pairs[0])
        queries = found[0].shape[1] if found[0].dim() == 3 else 1  # of a detector
        self.kl[part] += kl_of_logits(before, after).sum() / queries
        changed = before.argmax(-1) != after.argmax(-1)
        self.changed[part] += (changed.any(-1) if self.sigmoid else changed).sum() / queries
        for expected, got in pairs[1:]:
            objects = objects_of(pairs[0][0], self.sigmoid)
            self.kl[part] += box_error(got, expected, objects) * len(got) / queries
            sure, same = objects > CONFIDENT, pairs[0][0].argmax(-1) == pairs[0][1].argmax(-1)
            self.iou[part] += (box_iou(got, expected) * same)[sure].sum()
            self.sure[part] += sure.sum()

    def _run(self, env: dict[fx.Node, Any], ends: list[fx.Node], hook: Hook | None = None) -> list[Tensor]:
        found = self.graph.run(part_between(self.graph, env, ends), dict(env), hook=hook, keep=ends)
        return [found[end] for end in ends]

    def _hook(self, part: int) -> Hook:
        """Applies the quantizers of one part; every weight is quantized once."""
        own = set(self.parts[part])

        def apply(key: str, value: Tensor) -> Tensor:
            if key not in own:
                return value
            return self._weights[key] if key in self._weights else self.quantizers[key](value)

        return apply


def measured(graph: Graph) -> list[fx.Node]:
    """The outputs that are measured: logits or features, and a detector's boxes."""
    return [graph.output] if graph.boxes is None else [graph.output, graph.boxes]


def block_ends(graph: Graph, parts: Sequence[Sequence[fx.Node]]) -> list[fx.Node]:
    """The first place at or after all nodes of each part where one tensor [B, …] is all that the rest of the model
    needs: the end of a block, or the output."""
    order, dynamic = {node: i for i, node in enumerate(graph.fx.nodes)}, dynamic_nodes(graph)
    outputs, chosen = measured(graph), dict.fromkeys(choices(graph))

    def suffices(end: fx.Node) -> bool:
        rest = part_between(graph, {**chosen, end: None, graph.input: None}, outputs)
        return end.op == "call_function" and all(
            order[node] > order[end] and graph.input not in node.all_input_nodes
            for node in rest
            if node in dynamic and not op_name(node).startswith("aten.sym_size")
        )

    around = {node for block in graph.sites.blocks for node in (*block.sources, block.result)}
    ends = sorted(filter(suffices, around - set(outputs)), key=order.__getitem__)
    lasts = [max(order[node] for node in part) for part in parts]
    return [next((end for end in ends if order[end] >= last), graph.output) for last in lasts]


# -- running parts of a graph ------------------------------------------------------------------------------------------
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

    env: node -> value, all that the rest of the model needs at this point (a dictionary of the visitor's own), and what
    the float model chooses, here or later.
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
            visit(number, env | float_pass.chosen, float_pass.ahead)
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
        self._last_use |= dict.fromkeys([graph.input, *measured(graph)], len(order))
        wanted = choices(graph)
        found = graph.run(part_between(graph, self.env, wanted), dict(self.env), keep=wanted)
        self.chosen = {node: found[node] for node in wanted}

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
