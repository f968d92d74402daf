"""The walk that shows a method every tensor of the graph in order, in bounded memory."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from quantlens.calibration.images import Calibration
from quantlens.calibration.observers import Observation, Observer
from quantlens.errors import QuantlensError
from quantlens.graph import Edge, Graph

MEMORY = 1 << 30
"""Bytes of activations kept in memory between the steps of a walk; what exceeds it goes to temporary files."""

Transform = Callable[[Tensor], Tensor]
Seen = dict[tuple[str, int | None], tuple[float, Observation]]
"""(edge key, axis) -> (tail, observation) of the float model on one set of calibration images, without samples of the
values: what every width and every method that asks for no more can share (some 10 kB per edge)."""


class Look:
    """What a walk shows of one edge: ``look(axis=None, tail=0.0)`` gives an :class:`Observation` of its values over
    all calibration images (for a weight: of the weight); :meth:`tensors` gives the values themselves.

    ``sample=False`` is for rules that read no ``values``: the observation is then taken from ``seen``, where an earlier
    walk over the same images has left it."""

    def __init__(
        self, graph: Graph, edge: Edge, envs: _Environments, seed: int, arrive: Callable[[], None], seen: Seen | None
    ):
        self._graph, self._edge, self._envs, self._seed = graph, edge, envs, seed
        self._arrive, self._seen = arrive, seen

    def __call__(self, axis: int | None = None, tail: float = 0.0, *, sample: bool = True) -> Observation:
        if self._seen is None or sample:
            return self._observe(axis, tail, sample)
        key = (self._edge.key, axis)
        if key not in self._seen or self._seen[key][0] < tail:
            self._seen[key] = (tail, self._observe(axis, tail, sample))
        return self._seen[key][1].copy()  # other methods see the original

    def _observe(self, axis: int | None, tail: float, sample: bool) -> Observation:
        edge, pieces = self._edge, self.tensors()
        observer = Observer(axis=axis, tail=tail, pieces=len(pieces), seed=self._seed, sample=sample)
        try:
            for piece in pieces:
                observer.update(piece)
        except ValueError as error:
            raise QuantlensError(f"{edge.key}: {error}; check the weights and the calibration images") from error
        return observer.result()

    def tensors(self, edge: Edge | None = None) -> list[Tensor]:
        """The values that cross ``edge`` (this one; or another one of the same node), one tensor per piece of the
        images; one tensor for a weight or another constant. A sequential walk has applied to them what was decided
        for the edges before, not what was decided for the edge itself. Not to be changed in place."""
        edge = self._edge if edge is None else edge
        constant = self._graph.constant(edge.value)
        if constant is not None:
            return [constant]
        self._arrive()
        return _Pieces(self._envs, edge.value)  # type: ignore[return-value]


class Walk:
    """Shows every wanted edge of a graph, in execution order, to a function that decides what happens to it.

    ``decide(edge, look)`` is called once per edge in ``edges``; ``look`` shows the edge's values (:class:`Look`). What
    it returns, a function tensor -> tensor or None, is applied to the edge from then on if ``sequential``: later
    edges then see activations as the quantized part before them makes them; otherwise they see those of the float
    model.

    All images advance together, from one wanted edge to the next, so every operation runs once per chunk, and only as
    far as something is looked at. Activations that wait between two steps are kept within ``memory`` bytes; the rest
    goes to temporary files.

    seen: what earlier walks saw of this very graph on these images (see :class:`Look`); not for a sequential walk,
    which shows what the quantized part before an edge makes of it.
    """

    def __init__(
        self,
        graph: Graph,
        calibration: Calibration,
        *,
        sequential: bool,
        memory: int = MEMORY,
        seed: int = 0,
        seen: Seen | None = None,
    ):
        self.graph, self.calibration, self.sequential = graph, calibration, sequential
        self.memory, self.seed, self.seen = memory, seed, None if sequential else seen
        self._applied: dict[str, Transform] = {}
        self._weights: dict[str, Tensor] = {}

    def run(
        self,
        edges: list[Edge],
        decide: Callable[[Edge, Look], Transform | None],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Visit ``edges``; see the class. Raises QuantlensError naming the edge where values are not finite."""
        wanted: dict[fx.Node, list[Edge]] = {}
        for edge in edges:
            wanted.setdefault(edge.node, []).append(edge)
        order = list(self.graph.fx.nodes)
        stop = max(order.index(n) for n in wanted) + 1 if wanted else 0
        last_use = {source: i for i, node in enumerate(order[:stop]) for source in node.all_input_nodes}
        done = 0
        pending: list[fx.Node] = []
        with tempfile.TemporaryDirectory(prefix="quantlens-") as folder:
            envs = _Environments(self.calibration.pieces, self.memory, Path(folder))

            def settle(edge: Edge, place: int, keep: fx.Node | None = None) -> Transform | None:
                nonlocal done

                def arrive() -> None:
                    if pending:
                        self._advance(list(pending), envs, last_use, place, keep)
                        pending.clear()

                if self.sequential and not edge.is_weight:
                    arrive()
                look = Look(self.graph, edge, envs, self.seed, arrive, self.seen)
                transform = self._settle(edge, decide, look)
                done += 1
                if progress is not None:
                    progress(done, len(edges))
                return transform

            for i, node in enumerate(order[:stop]):
                for edge in (e for e in wanted.get(node, []) if e.position is not None):
                    settle(edge, i)
                if node.op == "placeholder" or node.op == "call_function":
                    pending.append(node)
                for edge in (e for e in wanted.get(node, []) if e.position is None):
                    transform = settle(edge, i, keep=node)
                    if transform is not None and self.sequential:
                        envs.change(node, transform)

    def _advance(
        self,
        nodes: list[fx.Node],
        envs: _Environments,
        last_use: dict,
        upto: int,
        keep: fx.Node | None = None,
    ) -> None:
        """Run ``nodes`` on every chunk; forget what nobody reads from node number ``upto`` on."""
        calls = [n for n in nodes if n.op == "call_function"]
        start = any(n.op == "placeholder" for n in nodes)
        for index in range(envs.count):
            env = envs.load(index)
            if start:
                env[self.graph.input] = self.calibration.chunk(index)
            alive = {n for n in [*env, *calls] if last_use.get(n, -1) >= upto or n is keep}
            self.graph.run(calls, env, hook=self._hook, keep=alive)
            envs.store(index, {n: v for n, v in env.items() if n in alive})
        if envs.count > 1:
            _return_memory()

    def _hook(self, key: str, value: Tensor) -> Tensor:
        if key in self._weights:
            return self._weights[key]
        transform = self._applied.get(key)
        return value if transform is None else transform(value)

    def _settle(self, edge: Edge, decide: Any, look: Look) -> Transform | None:
        transform = decide(edge, look)
        if transform is not None and self.sequential:
            if edge.is_weight:
                self._weights[edge.key] = transform(self.graph.tensor(str(edge.value.target)))
            elif edge.position is not None:
                self._applied[edge.key] = transform
        return transform


class _Pieces(Sequence):
    """The pieces of one value, read (from a file, if need be) when they are asked for."""

    def __init__(self, envs: _Environments, node: fx.Node):
        self._envs, self._node = envs, node

    def __len__(self) -> int:
        return self._envs.count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._envs.value(i, self._node) for i in range(*index.indices(len(self)))]
        return self._envs.value(range(len(self))[index], self._node)


class _Environments:
    """The live values of each chunk: in memory within a budget, in files beyond it."""

    def __init__(self, count: int, memory: int, folder: Path):
        self.count, self.memory, self.folder = count, memory, folder
        self._values: list[dict[fx.Node, Any]] = [{} for _ in range(count)]
        self._bytes = [0] * count
        self._serial = 0

    def load(self, index: int) -> dict[fx.Node, Any]:
        """The values of a chunk, all in memory; the caller owns the dictionary."""
        env = {n: v.read() if isinstance(v, _File) else v for n, v in self._values[index].items()}
        self._drop(index)
        return env

    def store(self, index: int, env: dict[fx.Node, Any]) -> None:
        if self.count > 1:  # a view would keep more alive than is counted
            env = {n: _own(v) if isinstance(v, Tensor) else v for n, v in env.items()}
        room = self.memory - sum(self._bytes)
        size = sum(v.numel() * v.element_size() for v in env.values() if isinstance(v, Tensor))
        if size <= room or self.count == 1:
            self._values[index], self._bytes[index] = env, size
        else:
            self._values[index] = {n: self._write(v) if isinstance(v, Tensor) else v for n, v in env.items()}

    def value(self, index: int, node: fx.Node) -> Tensor:
        value = self._values[index][node]
        return value.read() if isinstance(value, _File) else value

    def change(self, node: fx.Node, transform: Transform) -> None:
        for index in range(self.count):
            env = self.load(index)
            env[node] = transform(env[node])
            self.store(index, env)

    def _drop(self, index: int) -> None:
        for value in self._values[index].values():
            if isinstance(value, _File):
                value.path.unlink(missing_ok=True)
        self._values[index], self._bytes[index] = {}, 0

    def _write(self, value: Tensor) -> _File:
        self._serial += 1
        return _File(self.folder / f"{self._serial}.npy", value)


def _return_memory() -> None:
    """Give freed memory back to the system: glibc keeps what large tensors leave behind, and a walk frees thousands."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


def _own(value: Tensor) -> Tensor:
    return value.clone() if value.untyped_storage().nbytes() > value.numel() * value.element_size() else value


class _File:
    """A tensor in a temporary file."""

    def __init__(self, path: Path, value: Tensor):
        from quantlens.errors import StorageError

        self.path, self.device = path, value.device
        try:
            np.save(path, value.detach().cpu().contiguous().numpy(), allow_pickle=False)
        except OSError as error:
            raise StorageError(
                f"no room for temporary activations in {path.parent}: {error.strerror}; "
                "use fewer calibration images or set TMPDIR"
            ) from error

    def read(self) -> Tensor:
        return torch.from_numpy(np.load(self.path, allow_pickle=False)).to(self.device)
