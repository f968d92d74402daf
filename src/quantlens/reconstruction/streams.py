"""The values between units for all calibration images, of the float and of the quantized graph, in bounded memory."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.calibration import CHUNK, Calibration
from quantlens.errors import StorageError, UnsupportedError
from quantlens.formats import Quantizer
from quantlens.graph import Graph
from quantlens.reconstruction.units import Unit


class Room:
    """Where cached tensors live: in memory within a budget, in mapped files beyond it."""

    def __init__(self, budget: int, folder: Path):
        self.left, self.folder, self._serial = budget, folder, 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, int]:
        """A tensor of that shape and the bytes that it takes of the budget."""
        size = math.prod(shape) * dtype.itemsize
        if size <= self.left:
            self.left -= size
            return torch.empty(shape, dtype=dtype, device=device), size
        self._serial += 1
        path = self.folder / f"{self._serial}.bin"
        try:
            with open(path, "wb") as file:
                file.truncate(max(size, 1))
            flat = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype)
            path.unlink()  # the mapping keeps it until the tensor goes
        except OSError as error:
            raise StorageError(f"no room for temporary activations in {path.parent}: {error.strerror}") from error
        return flat.view(shape), 0


class Cache:
    """One value for all images, [N·k, …]: k rows per image, in the order of the images (k = 1 but for windows)."""

    def __init__(self, room: Room, count: int):
        self.room, self.count = room, count
        self.tensor: Tensor | None = None
        self.rows = 1
        self._taken = 0

    def put(self, first: int, images: int, value: Tensor) -> None:
        """Store the value of ``images`` images, starting at number ``first``."""
        if self.tensor is None:
            if value.shape[0] % images:
                raise UnsupportedError(f"a value of shape {list(value.shape)} cannot be told apart by image")
            self.rows = value.shape[0] // images
            shape = (self.count * self.rows, *value.shape[1:])
            self.tensor, self._taken = self.room.empty(shape, value.dtype, value.device)
        self.tensor[first * self.rows : (first + images) * self.rows] = value

    def slice(self, first: int, last: int, device: torch.device) -> Tensor:
        return self.tensor[first * self.rows : last * self.rows].to(device)  # type: ignore[index]

    def pick(self, images: Tensor, device: torch.device) -> Tensor:
        """The rows of the images numbered ``images`` (int64, CPU)."""
        if self.rows > 1:
            images = (images[:, None] * self.rows + torch.arange(self.rows)).flatten()
        tensor: Tensor = self.tensor  # type: ignore[assignment]
        return tensor.index_select(0, images.to(tensor.device)).to(device)

    def free(self) -> None:
        self.room.left += self._taken
        self.tensor, self._taken = None, 0


Hook = Callable[[str, Tensor], Tensor]


class Streams:
    """The values between units for all images, of the float graph and of the quantized one."""

    def __init__(self, graph: Graph, units: list[Unit], calibration: Calibration, room: Room):
        self.graph, self.room, self.count = graph, room, calibration.count
        self.device = graph.device
        images = Cache(room, self.count)
        for index, chunk in enumerate(calibration):
            images.put(index * CHUNK, len(chunk), chunk)
        self.float: dict[fx.Node, Cache] = {graph.input: images}
        self.quantized: dict[fx.Node, Cache] = {graph.input: images}
        self.last_use = {s: i for i, unit in enumerate(units) for s in unit.sources}

    def run(self, unit: Unit, env: dict[fx.Node, Any], images: int, hook: Hook | None) -> list[Tensor]:
        """Values of the unit's results; ``env`` holds its sources."""
        return run_unit(self.graph, unit, env, images, hook)

    def outputs(
        self, unit: Unit, hook: Hook | None, constants: Mapping[fx.Node, Tensor] | None = None
    ) -> dict[fx.Node, Cache]:
        """The quantized unit's results for all images. constants: what stands in for tensors of the graph."""
        return self._outputs(self.quantized, unit, self.graph, unit, hook, constants or {})

    def _outputs(
        self,
        inputs: dict[fx.Node, Cache],
        unit: Unit,
        graph: Graph,
        same: Unit,
        hook: Hook | None,
        constants: Mapping[fx.Node, Tensor],
    ) -> dict[fx.Node, Cache]:
        """Results of ``unit``, computed by its counterpart ``same`` in ``graph``."""
        caches = {node: Cache(self.room, self.count) for node in unit.results}
        for first in range(0, self.count, CHUNK):
            last = min(first + CHUNK, self.count)
            pairs = zip(unit.sources, same.sources, strict=True)
            env: dict[fx.Node, Any] = {s: inputs[n].slice(first, last, self.device) for n, s in pairs}
            env.update(constants)
            for node, value in zip(unit.results, run_unit(graph, same, env, last - first, hook), strict=True):
                caches[node].put(first, last - first, value)
        return caches

    def advance_float(self, unit: Unit, graph: Graph, same: Unit) -> None:
        """Take the float stream through ``unit``, as its counterpart ``same`` in the float model ``graph`` has it."""
        self.float.update(self._outputs(self.float, unit, graph, same, None, {}))

    def advance_quantized(self, unit: Unit, outputs: dict[fx.Node, Cache]) -> None:
        self.quantized.update(outputs)

    def forget(self, done: int) -> None:
        """Free what no unit behind number ``done`` reads."""
        for stream in (self.float, self.quantized):
            for node in [n for n in stream if self.last_use.get(n, -1) <= done]:
                stream.pop(node).free()

    def inputs(self, unit: Unit, images: Tensor, kind: str, float_share: float, generator: torch.Generator) -> dict:
        """The unit's sources for a mini-batch: of the "quantized" or the "float" stream, or "mixed", element by element
        (the float one with probability ``float_share``)."""
        env: dict[fx.Node, Any] = {}
        for node in unit.sources:
            if kind == "float" or self.quantized[node] is self.float[node]:
                env[node] = self.float[node].pick(images, self.device)
                continue
            env[node] = self.quantized[node].pick(images, self.device)
            if kind == "mixed":
                exact = self.float[node].pick(images, self.device)
                env[node] = torch.where(random_mask(exact.shape, float_share, generator, self.device), exact, env[node])
        return env


def run_unit(graph: Graph, unit: Unit, env: dict[fx.Node, Any], images: int, hook: Hook | None) -> list[Tensor]:
    """Values of a unit's results; ``env`` holds its sources, ``images`` is the size of the batch."""
    shape = (images, *graph.input.meta["shape"][1:])
    env.setdefault(graph.input, torch.empty(shape, device="meta"))  # for its batch size alone
    out = graph.run(unit.nodes, env, hook=hook, keep=unit.results)
    return [out[node] for node in unit.results]


def frozen_hook(
    graph: Graph, unit: Unit, quantizers: Mapping[str, Quantizer], tensors: Mapping[str, Tensor] | None = None
) -> Hook:
    """Applies quantizers to the edges of a unit, weights encoded once. tensors: weights that stand in for the graph's,
    by name."""
    weights: dict[str, Tensor] = {}
    for edge in unit.edges:
        name = str(edge.value.target)
        if edge.is_weight and (edge.key in quantizers or (tensors and name in tensors)):
            weight = tensors[name] if tensors and name in tensors else graph.tensor(name)
            weights[edge.key] = quantizers[edge.key](weight) if edge.key in quantizers else weight

    def hook(key: str, value: Tensor) -> Tensor:
        if key in weights:
            return weights[key]
        quantizer = quantizers.get(key)
        return value if quantizer is None else quantizer(value)

    return hook


def random_mask(shape: torch.Size, p: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Bool, True with probability p; drawn on the CPU, so that all devices see the same."""
    return (torch.rand(shape, generator=generator) < p).to(device)


HELD = 1 << 28
"""Bytes of freed memory that the process keeps while it trains."""


@contextmanager
def held_memory() -> Iterator[None]:
    """Freed memory stays with the process, up to :data:`HELD` bytes, and goes back at the end (glibc; elsewhere nothing
    happens).

    A training step makes and frees hundreds of tensors of some MB. glibc gives each back to the system and asks for it
    again, and touching fresh pages takes several times as long as the arithmetic on them.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 25)  # the largest there is
        libc.mallopt(trim_threshold, HELD)
        libc.mallopt(top_pad, HELD // 4)
    except (OSError, AttributeError):  # another C library
        yield
        return
    try:
        yield
    finally:
        libc.mallopt(trim_threshold, 1 << 26)  # twice the largest mmap threshold, where glibc's own rule ends
        libc.mallopt(top_pad, 0)
        libc.malloc_trim(0)
