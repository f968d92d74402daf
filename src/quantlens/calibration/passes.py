"""The pass over the calibration images that shows a method every tensor of the graph in order, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx

from quantlens.calibration.cache import ActivationStore, StoredTensor, return_memory
from quantlens.calibration.images import Calibration
from quantlens.calibration.observers import Observation, Observer
from quantlens.errors import QuantlensError
from quantlens.graph import Edge, Graph

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

    def __init__(self, edge: Edge, images: _ImageStream, seed: int, seen: ObservationCache | None):
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


OnEdge = Callable[[Edge, EdgeView], Replacement | None]


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

    def run(self, edges: list[Edge], on_edge: OnEdge, progress: Callable[[int, int], None] | None = None) -> None:
        """Call ``on_edge(edge, view)`` once for each of ``edges``: those that a node reads before those that it makes.
        What it returns is a function tensor -> tensor, or None for the edge as it is.

        Raises QuantlensError naming the edge where values are not finite, StorageError where the disk is full.
        """
        order = {node: place for place, node in enumerate(self.graph.fx.nodes)}
        visits = sorted(edges, key=lambda edge: (order[edge.node], edge.position is None))
        with ActivationStore(self.memory) as store:
            images = _ImageStream(self.graph, self.calibration, {edge.node for edge in edges}, store)
            for done, edge in enumerate(visits, 1):
                if self.sequential and not edge.is_weight:
                    images.advance_to(edge)
                replacement = on_edge(edge, EdgeView(edge, images, self.seed, self.seen))
                if self.sequential and replacement is not None:
                    images.apply(edge, replacement)
                if progress is not None:
                    progress(done, len(edges))
        return_memory()


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
                    env[self.graph.input] = self.calibration.chunk(index)
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
