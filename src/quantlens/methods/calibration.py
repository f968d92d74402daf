"""Calibration: the images, and the walk that shows a method every tensor of the graph in order, in bounded memory."""

from __future__ import annotations

import ctypes
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from quantlens.errors import QuantlensError
from quantlens.graph import Edge, Graph
from quantlens.ranges import Observation, Observer

CHUNK = 32
"""Images that go through the graph together."""

MEMORY = 1 << 30
"""Bytes of activations kept in memory between the steps of a walk; what exceeds it goes to temporary files."""

Transform = Callable[[Tensor], Tensor]


class Calibration:
    """Calibration images in chunks of :data:`CHUNK`, with where they come from.

    Memory: images given as an image set are read chunk by chunk when they are needed; tensors stay where they are.
    """

    def __init__(self, chunks: Any, count: int, *, source: str, fingerprint: str | None, device: torch.device):
        self._chunks, self.count = chunks, count
        self.source, self.fingerprint, self.device = source, fingerprint, device

    @classmethod
    def of(cls, images: Any, preprocess: Any, *, device: torch.device | str = "cpu") -> Calibration:
        """From a float tensor [N, 3, H, W], an iterable of tensors or (tensor, labels) batches, an image set, or a
        source.

        Raises QuantlensError: no images, wrong shape, values that are not finite.
        """
        device = torch.device(device)
        if isinstance(images, Calibration):
            return images
        if isinstance(images, Iterable) and not isinstance(images, str | Tensor) and not hasattr(images, "batches"):
            batches = [b[0] if isinstance(b, list | tuple) else b for b in images]
            images = (
                torch.cat([torch.as_tensor(b) for b in batches]) if batches else torch.empty(0, *preprocess.input_size)
            )
        if isinstance(images, Tensor):
            _check(images, tuple(preprocess.input_size))
            return cls(images, len(images), source="tensor", fingerprint=_fingerprint(images), device=device)
        from quantlens.data import as_image_set

        found = as_image_set(images, preprocess)
        if len(found) == 0:
            raise QuantlensError("no calibration images: give at least one, 32 is the usual number")
        return cls(found, len(found), source=str(found.source), fingerprint=found.fingerprint, device=device)

    def __len__(self) -> int:
        return self.count

    @property
    def pieces(self) -> int:
        return math.ceil(self.count / CHUNK)

    def chunk(self, index: int) -> Tensor:
        """Chunk ``index`` on the device: float32 [≤ CHUNK, 3, H, W]."""
        start, stop = index * CHUNK, min((index + 1) * CHUNK, self.count)
        images = self._chunks[start:stop] if isinstance(self._chunks, Tensor) else self._chunks.tensor(start, stop)
        return images.to(self.device, torch.float32)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.chunk(i) for i in range(self.pieces))

    def info(self) -> dict[str, Any]:
        return {"source": self.source, "n": self.count, "fingerprint": self.fingerprint}


def _check(images: Tensor, size: tuple[int, ...]) -> None:
    if len(images) == 0:
        raise QuantlensError("no calibration images: give at least one, 32 is the usual number")
    if images.dim() != 4 or tuple(images.shape[1:]) != size or not images.is_floating_point():
        raise QuantlensError(
            f"calibration images have shape {list(images.shape)} and type {images.dtype}; the model wants float [N, "
            f"{', '.join(map(str, size))}], prepared with its own mean and deviation"
        )
    if not bool(torch.isfinite(images).all()):
        raise QuantlensError("calibration images hold NaN or infinity")


def _fingerprint(images: Tensor) -> str:
    import hashlib

    return hashlib.sha256(images.detach().cpu().contiguous().float().numpy().tobytes()).hexdigest()[:16]


class Walk:
    """Shows every wanted edge of a graph, in execution order, to a function that decides what happens to it.

    ``decide(edge, observe)`` is called once per edge in ``edges``. ``observe(axis=None, tail=0.0)`` gives an
    :class:`Observation` of the values that cross the edge over all calibration images (for a weight: of the weight).
    What it returns, a function tensor -> tensor or None, is applied to the edge from then on if ``sequential``: later
    edges then see activations as the quantized part before them makes them; otherwise they see those of the float
    model.

    All images advance together, from one wanted edge to the next, so every operation runs once per chunk. Activations
    that wait between two steps are kept within ``memory`` bytes; the rest goes to temporary files.
    """

    def __init__(
        self, graph: Graph, calibration: Calibration, *, sequential: bool, memory: int = MEMORY, seed: int = 0
    ):
        self.graph, self.calibration, self.sequential = graph, calibration, sequential
        self.memory, self.seed = memory, seed
        self._applied: dict[str, Transform] = {}
        self._weights: dict[str, Tensor] = {}

    def run(
        self,
        edges: list[Edge],
        decide: Callable[[Edge, Callable[..., Observation]], Transform | None],
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
            for i, node in enumerate(order[:stop]):
                before = [e for e in wanted.get(node, []) if e.position is not None]
                if any(not e.is_weight for e in before) and pending:
                    self._advance(pending, envs, last_use, i)
                    pending = []
                for edge in before:
                    self._settle(edge, decide, envs)
                    done += 1
                    if progress is not None:
                        progress(done, len(edges))
                if node.op == "placeholder" or node.op == "call_function":
                    pending.append(node)
                for edge in (e for e in wanted.get(node, []) if e.position is None):
                    self._advance(pending, envs, last_use, i, keep=node)
                    pending = []
                    transform = self._settle(edge, decide, envs)
                    if transform is not None and self.sequential:
                        envs.change(node, transform)
                    done += 1
                    if progress is not None:
                        progress(done, len(edges))

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

    def _settle(self, edge: Edge, decide: Any, envs: _Environments) -> Transform | None:
        def observe(axis: int | None = None, tail: float = 0.0) -> Observation:
            try:
                if edge.is_weight:
                    observer = Observer(axis=axis, tail=tail, seed=self.seed)
                    observer.update(self.graph.tensor(str(edge.value.target)))
                    return observer.result()
                observer = Observer(axis=axis, tail=tail, pieces=envs.count, seed=self.seed)
                for index in range(envs.count):
                    observer.update(envs.value(index, edge.value))
            except ValueError as error:
                raise QuantlensError(f"{edge.key}: {error}; check the weights and the calibration images") from error
            return observer.result()

        transform = decide(edge, observe)
        if transform is not None and self.sequential:
            if edge.is_weight:
                self._weights[edge.key] = transform(self.graph.tensor(str(edge.value.target)))
            elif edge.position is not None:
                self._applied[edge.key] = transform
        return transform


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
