"""The values between units for all calibration images, of the float and of the quantized graph, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.calibration import CHUNK, ActivationStore, Calibration, StoredTensor
from quantlens.errors import UnsupportedError
from quantlens.formats import Quantizer
from quantlens.graph import Graph
from quantlens.reconstruction.units import Unit


class ImageCache:
    """One value for all images, [N·k, …]: k rows per image, in the order of the images (k = 1 but for windows)."""

    def __init__(self, store: ActivationStore, count: int):
        self.store, self.count = store, count
        self.rows = 1
        self._values: StoredTensor | None = None

    @property
    def values(self) -> StoredTensor:
        """What was stored; raises ValueError before the first :meth:`put` and after :meth:`free`."""
        if self._values is None:
            raise ValueError("nothing is stored")
        return self._values

    def put(self, first: int, images: int, value: Tensor) -> None:
        """Store the value of ``images`` images, starting at number ``first``. Raises StorageError for a full disk."""
        if self._values is None:
            if value.shape[0] % images:
                raise UnsupportedError(f"a value of shape {list(value.shape)} cannot be told apart by image")
            self.rows = value.shape[0] // images
            self._values = self.store.empty((self.count * self.rows, *value.shape[1:]), value.dtype, value.device)
        self._values.write(first * self.rows, value)

    def slice(self, first: int, last: int, device: torch.device) -> Tensor:
        """The values of the images numbered ``first`` … ``last`` − 1."""
        return self.values.rows(first * self.rows, last * self.rows).to(device)

    def pick(self, images: Tensor, device: torch.device) -> Tensor:
        """The values of the images numbered ``images`` (int64, CPU)."""
        if self.rows > 1:
            images = (images[:, None] * self.rows + torch.arange(self.rows)).flatten()
        return self.values.pick(images).to(device)

    def free(self) -> None:
        if self._values is not None:
            self._values.free()
            self._values = None


Hook = Callable[[str, Tensor], Tensor]


class Streams:
    """The values between units for all images, of the float graph and of the quantized one."""

    def __init__(self, graph: Graph, units: list[Unit], calibration: Calibration, store: ActivationStore):
        self.graph, self.store, self.count = graph, store, calibration.count
        self.device = graph.device
        images = ImageCache(store, self.count)
        for index, chunk in enumerate(calibration):
            images.put(index * CHUNK, len(chunk), chunk)
        self.float: dict[fx.Node, ImageCache] = {graph.input: images}
        self.quantized: dict[fx.Node, ImageCache] = {graph.input: images}
        self.last_use = {s: i for i, unit in enumerate(units) for s in unit.sources}

    def run(self, unit: Unit, env: dict[fx.Node, Any], images: int, hook: Hook | None) -> list[Tensor]:
        """Values of the unit's results; ``env`` holds its sources."""
        return run_unit(self.graph, unit, env, images, hook)

    def outputs(
        self, unit: Unit, hook: Hook | None, constants: Mapping[fx.Node, Tensor] | None = None
    ) -> dict[fx.Node, ImageCache]:
        """The quantized unit's results for all images. constants: what stands in for tensors of the graph."""
        return self._outputs(self.quantized, unit, self.graph, unit, hook, constants or {})

    def _outputs(
        self,
        inputs: dict[fx.Node, ImageCache],
        unit: Unit,
        graph: Graph,
        same: Unit,
        hook: Hook | None,
        constants: Mapping[fx.Node, Tensor],
    ) -> dict[fx.Node, ImageCache]:
        """Results of ``unit``, computed by its counterpart ``same`` in ``graph``."""
        caches = {node: ImageCache(self.store, self.count) for node in unit.results}
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

    def advance_quantized(self, unit: Unit, outputs: dict[fx.Node, ImageCache]) -> None:
        self.quantized.update(outputs)

    def forget(self, done: int) -> None:
        """Free what no unit after number ``done`` reads."""
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
