"""The pass over the calibration images that shows a method every tensor of the graph in order, in bounded memory; and
the observers that collect what a range rule needs of a tensor."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.calibration.cache import ActivationStore, StoredTensor, return_memory
from quantlens.calibration.images import Calibration
from quantlens.errors import QuantlensError
from quantlens.graph import Edge, Graph

# -- observers -----------------------------------------------------------------------------------------------------
# Observers: collect what a range rule needs, in bounded memory, from values that arrive in pieces.
#
# An :class:`Observer` sees tensors; :meth:`Observer.result` gives an :class:`Observation`: rows of statistics, one row
# per scale to be set (1 for a tensor, C for channels, H for heads). Extreme quantiles are exact: only the tails that
# they need are kept.


VALUES = 1 << 19
"""Most values an observation keeps for error-minimising rules (2 MiB of float32); beyond it, a random sample."""

_PROBE = 1 << 16
_PIECE = 64


@dataclass(frozen=True)
class Observation:
    """What was seen, G rows.

    low, high: [G] smallest and largest value. count: values per row.
    values: [G, m] float32, the values themselves or (m < count) a random sample of them; m = 0 where none was asked
    for.
    lower, upper: [G, t] sorted extreme values, the ``t`` smallest ascending and the ``t`` largest descending.
    """

    low: Tensor
    high: Tensor
    count: int
    values: Tensor
    lower: Tensor
    upper: Tensor

    @classmethod
    def of(cls, rows: Tensor, tail: float = 0.0) -> "Observation":
        """Statistics of rows [G, n] held in memory; quantiles up to ``tail`` from either end are prepared."""
        lower, upper = _tails(rows, _tail_count(tail, rows.shape[1]))
        return cls(lower[:, 0], upper[:, 0], rows.shape[1], rows, lower, upper)

    def copy(self) -> "Observation":
        """The same statistics in tensors of their own."""
        return replace(self, **{name: part.clone() for name, part in vars(self).items() if isinstance(part, Tensor)})

    def quantile(self, p: float) -> Tensor:
        """[G] quantile of order ``p`` in [0, 1], linear interpolation (as ``torch.quantile``), exact over all values
        seen.

        Raises ValueError if ``p`` lies deeper than the tails that were collected.
        """
        position = p * (self.count - 1)
        pair = []
        for index in (math.floor(position), math.ceil(position)):
            from_top = self.count - 1 - index
            if index < self.lower.shape[1]:
                pair.append(self.lower[:, index])
            elif from_top < self.upper.shape[1]:
                pair.append(self.upper[:, from_top])
            else:
                raise ValueError(f"quantile {p} was not prepared: observe with tail >= {min(p, 1 - p):g}")
        return torch.lerp(pair[0], pair[1], position - math.floor(position))


def _tail_count(tail: float, count: int) -> int:
    """How many extreme values quantiles up to ``tail`` from an end lie between; the extreme one alone for 0."""
    return min(count, math.ceil(tail * (count - 1)) + 2) if tail > 0 else 1


def _tails(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest (ascending) and k largest (descending) of each row of [G, n], exactly."""
    k = min(k, rows.shape[1])
    if k == 1:
        return rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    if rows.shape[0] == 1 and rows.shape[1] > 4 * _PROBE and k * 16 < rows.shape[1]:
        return _far(rows[0], k, largest=False)[None], _far(rows[0], k, largest=True)[None]
    return rows.topk(k, dim=1, largest=False).values, rows.topk(k, dim=1).values


def _far(flat: Tensor, k: int, *, largest: bool) -> Tensor:
    """The k most extreme of many values, the most extreme first. A threshold from a sample cuts the candidates before
    the exact selection: first pieces of :data:`_PIECE` values by their own extremes, then values."""
    step = max(1, flat.numel() // _PROBE) | 1
    probe = flat[::step]
    keep = min(probe.numel(), math.ceil(2 * k / flat.numel() * probe.numel()) + 16)
    threshold = probe.topk(keep, largest=largest).values[-1]
    beyond = torch.gt if largest else torch.lt
    pieces = flat[: flat.numel() // _PIECE * _PIECE].view(-1, _PIECE)
    ends = pieces.amax(1) if largest else pieces.amin(1)
    candidates = torch.cat([pieces[beyond(ends, threshold)].flatten(), flat[pieces.numel() :]])
    candidates = candidates[beyond(candidates, threshold)]
    if candidates.numel() < k and int(torch.count_nonzero(flat == threshold)) >= k - candidates.numel():
        candidates = torch.cat([candidates, threshold.expand(k)])  # a value that many share
    if candidates.numel() < k or bool(ends.isnan().any()):
        candidates = flat
    return candidates.topk(k, largest=largest).values


def as_rows(x: Tensor, axis: int | None) -> Tensor:
    """[…] -> [G, n]: one row per index of ``axis``, or a single row."""
    if axis is None:
        return x.reshape(1, -1)
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


class Observer:
    """Collects an :class:`Observation` over pieces.

    axis: dimension with a row per index, ``None`` for one row.
    tail: how deep from either end quantiles will be asked for (0.001 keeps a thousandth of the values on each side).
    pieces: how many pieces will come, none larger than the first; with one piece nothing is copied. sample: whether the
    rule reads ``values``. Memory is bounded by ``VALUES`` floats plus the tails.
    """

    def __init__(
        self, *, axis: int | None = None, tail: float = 0.0, pieces: int = 1, seed: int = 0, sample: bool = True
    ):
        self.axis, self.tail, self.pieces, self.sample = axis, tail, pieces, sample
        self._generator = torch.Generator().manual_seed(seed)
        self._keep = 0
        self._result: Observation | None = None

    def update(self, x: Tensor) -> None:
        """Take one piece [..., any shape with the same axis]. Raises ValueError on NaN or infinity."""
        rows = as_rows(x.detach().float(), self.axis)
        # every piece is given the tail of the whole, so that the merged tails are exact wherever the extremes fell
        k = self._keep = max(self._keep, _tail_count(self.tail, rows.shape[1] * self.pieces))
        lower, upper = _tails(rows, k)
        if not bool(torch.isfinite(lower[:, 0]).all() & torch.isfinite(upper[:, 0]).all()) or bool(upper.isnan().any()):
            raise ValueError("values are not finite")
        values = self._thin(rows) if self.sample else rows[:, :0].clone()
        count, old = rows.shape[1], self._result
        if old is not None:
            lower = torch.cat([old.lower, lower], 1).sort(dim=1).values[:, :k]
            upper = torch.cat([old.upper, upper], 1).sort(dim=1, descending=True).values[:, :k]
            values = self._merge(old, values, count) if self.sample else values
            count += old.count
        self._result = Observation(lower[:, 0], upper[:, 0], count, values, lower, upper)

    def result(self) -> Observation:
        if self._result is None:
            raise ValueError("nothing was observed")
        return self._result

    def _thin(self, rows: Tensor) -> Tensor:
        most = VALUES // rows.shape[0]
        if rows.shape[1] <= most:
            return rows
        index = torch.randint(rows.shape[1], (most,), generator=self._generator).to(rows.device)
        return rows.index_select(1, index)

    def _merge(self, old: Observation, sample: Tensor, new: int) -> Tensor:
        """A sample of everything from a sample of the past and one of the new piece, in proportion to their counts."""
        most = VALUES // sample.shape[0]
        share = max(min(round(most * new / (old.count + new)), sample.shape[1]), 1)
        rest = min(old.values.shape[1], most - share)
        return torch.cat([self._pick(old.values, rest), self._pick(sample, share)], 1)

    def _pick(self, rows: Tensor, k: int) -> Tensor:
        if k >= rows.shape[1]:
            return rows
        index = torch.randperm(rows.shape[1], generator=self._generator)[:k].to(rows.device)
        return rows.index_select(1, index)


# -- the pass --------------------------------------------------------------------------------------------------------
Replacement = Callable[[Tensor], Tensor]
"""What is computed with in place of an edge's value from then on, made of that value: a quantizer, a rounded weight."""

ObservationCache = dict[tuple[str, int | None], tuple[float, Observation]]
"""(edge key, axis) -> (tail, observation) of the float model on one set of calibration images, without samples of the
values: what every width and every method that asks for no more can share (some 10 kB per edge)."""


class EdgeView:
    """What a pass shows of one edge: ``view(axis=None, tail=0.0)`` gives an :class:`Observation` of its values over all
    calibration images (for a weight: of the weight); :meth:`tensors` gives the values themselves.

    ``sample=False`` is for rules that read no ``values``: the observation is then taken from ``seen``, where an earlier
    pass over the same images has left it. A view shows its edge until the function that it was given to returns.
    """

    def __init__(self, edge: Edge, images: "_ImageStream", seed: int, seen: ObservationCache | None):
        self._edge, self._images, self._seed, self._seen = edge, images, seed, seen

    def __call__(self, axis: int | None = None, tail: float = 0.0, *, sample: bool = True) -> Observation:
        if self._seen is None or sample:
            return self._observe(axis, tail, sample)
        key = (self._edge.key, axis)
        if key not in self._seen or self._seen[key][0] < tail:
            self._seen[key] = (tail, self._observe(axis, tail, sample))
        return self._seen[key][1].copy()  # other methods see the original

    def _observe(self, axis: int | None, tail: float, sample: bool) -> Observation:
        pieces = self.tensors()
        observer = Observer(axis=axis, tail=tail, pieces=len(pieces), seed=self._seed, sample=sample)
        try:
            for piece in pieces:
                observer.update(piece)
        except ValueError as error:
            raise QuantlensError(f"{self._edge.key}: {error}; check the weights and the calibration images") from error
        return observer.result()

    def tensors(self, edge: Edge | None = None) -> Sequence[Tensor]:
        """The values that cross ``edge`` (this one; or another one of the same node), one tensor per piece of the
        images; one tensor for a weight or another constant. A sequential pass has applied to them what was decided for
        the edges before, not what was decided for the edge itself. Not to be changed in place."""
        value = (self._edge if edge is None else edge).value
        constant = self._images.graph.constant(value)
        if constant is not None:
            return [constant]
        self._images.advance_to(self._edge)
        return _Pieces(self._images, value)


OnEdge = Callable[[Edge, EdgeView], Any]
"""What a pass calls for each edge; a sequential one is given the edge's :data:`Replacement`, or None."""


class CalibrationPass:
    """Shows every wanted edge of a graph, in execution order, to a function that decides what happens to it.

    If ``sequential``, what the function returns for an edge is applied to it, so that later edges see activations as
    the quantized part before them makes them; otherwise they see those of the float model. All images advance together
    from one wanted edge to the next: every operation runs once per chunk, and only as far as something is looked at.

    memory: bytes of activations that wait in memory between two steps (default: ``cache.MEMORY``), the rest in a file.
    seen: what earlier passes saw of this very graph on these images (see :class:`EdgeView`); not if ``sequential``.
    """

    def __init__(
        self,
        graph: Graph,
        calibration: Calibration,
        *,
        sequential: bool,
        memory: int | None = None,
        seed: int = 0,
        seen: ObservationCache | None = None,
    ):
        self.graph, self.calibration, self.sequential = graph, calibration, sequential
        self.memory, self.seed, self.seen = memory, seed, None if sequential else seen

    def run(
        self, edges: list[Edge], on_edge: OnEdge, progress: Callable[[int, int], None] | None = None
    ) -> dict[Edge, Any]:
        """Call ``on_edge(edge, view)`` once for each of ``edges``: those that a node reads before those that it makes.
        Returns what it gave, by edge; in a sequential pass a function tensor -> tensor, or None for the edge as it is.

        Raises QuantlensError naming the edge where values are not finite, StorageError where the disk is full.
        """
        order = {node: place for place, node in enumerate(self.graph.fx.nodes)}
        visits = sorted(edges, key=lambda edge: (order[edge.node], edge.position is None))
        made: dict[Edge, Any] = {}
        with ActivationStore(self.memory) as store:
            images = _ImageStream(self.graph, self.calibration, {edge.node for edge in edges}, store)
            for done, edge in enumerate(visits, 1):
                if self.sequential and not edge.is_weight:
                    images.advance_to(edge)
                made[edge] = on_edge(edge, EdgeView(edge, images, self.seed, self.seen))
                if self.sequential and made[edge] is not None:
                    images.apply(edge, made[edge])
                if progress is not None:
                    progress(done, len(edges))
        return_memory()
        return made


class _ImageStream:
    """All calibration images at one place of a graph: the values that later nodes read, chunk by chunk."""

    def __init__(self, graph: Graph, calibration: Calibration, wanted: set[fx.Node], store: ActivationStore):
        self.graph, self.calibration = graph, calibration
        self._store = store
        self._values: list[dict[fx.Node, Any]] = [{} for _ in range(calibration.pieces)]
        nodes = list(graph.fx.nodes)
        last = max((place for place, node in enumerate(nodes) if node in wanted), default=-1)
        self._nodes = nodes[: last + 1]
        self._place = {node: place for place, node in enumerate(self._nodes)}
        self._last_use = {source: place for place, node in enumerate(self._nodes) for source in node.all_input_nodes}
        self._done = 0  # so many nodes have run
        self._replacements: dict[str, Replacement] = {}

    def advance_to(self, edge: Edge) -> None:
        """Run all that comes before ``edge``; of what was computed, only what its node and later ones read is kept."""
        place = self._place[edge.node]
        stop = place + (edge.position is None)  # what a node makes, or what it reads
        if stop <= self._done:
            return
        nodes, self._done = self._nodes[self._done : stop], stop
        calls = [node for node in nodes if node.op == "call_function"]
        starts = any(node.op == "placeholder" for node in nodes)
        for index in range(len(self)):
            with self._chunk(index) as env:
                if starts:
                    env |= self.calibration.inputs(self.graph, index)
                alive = {n for n in [*env, *calls] if self._last_use.get(n, -1) >= place}
                alive |= {edge.node} if edge.position is None else set()
                self.graph.run(calls, env, hook=self._hook, keep=alive)
                for node in env.keys() - alive:
                    del env[node]
        if len(self) > 1:
            return_memory()

    def apply(self, edge: Edge, replacement: Replacement) -> None:
        """From now on, ``edge`` carries what ``replacement`` makes of its values."""
        if edge.is_weight:
            made = replacement(self.graph.tensor(str(edge.value.target)))
            self._replacements[edge.key] = lambda _: made
        elif edge.position is not None:
            self._replacements[edge.key] = replacement
        else:
            for index in range(len(self)):
                with self._chunk(index) as env:
                    env[edge.node] = replacement(env[edge.node])

    def _hook(self, key: str, value: Tensor) -> Tensor:
        return self._replacements[key](value) if key in self._replacements else value

    def __len__(self) -> int:
        return len(self._values)

    def value(self, index: int, node: fx.Node) -> Any:
        """The value of a node for chunk ``index``."""
        value = self._values[index][node]
        return value.read() if isinstance(value, StoredTensor) else value

    @contextmanager
    def _chunk(self, index: int) -> Iterator[dict[fx.Node, Any]]:
        """All values of chunk ``index``, to be changed; they are stored again afterwards. Those of a chunk that is the
        only one never are: the next step would read all of it back."""
        env = {node: self.value(index, node) for node in self._values[index]}
        for value in self._values[index].values():
            if isinstance(value, StoredTensor):
                value.free()
        self._values[index] = env
        yield env
        for node, value in env.items() if len(self) > 1 else ():
            if isinstance(value, Tensor):
                env[node] = self._store.put(_own(value))


def _own(value: Tensor) -> Tensor:
    """A tensor that keeps no more memory alive than its own values: a view is copied."""
    return value.clone() if value.untyped_storage().nbytes() > value.numel() * value.element_size() else value


class _Pieces(Sequence[Tensor]):
    """The values of one node, one tensor per chunk of images, read when they are asked for."""

    def __init__(self, images: _ImageStream, node: fx.Node):
        self._images, self._node = images, node

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        return self._images.value(index, self._node)
