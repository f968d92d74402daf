"""Block reconstruction: a part of the network is tuned so that, quantized, it puts out what the float part puts out
(BRECQ, Li et al., ICLR 2021, section 3.2; QDrop, Wei et al., ICLR 2022, section 3.3).

The network is cut into :class:`Unit` s, one after the other: every transformer block, and what lies between two blocks
(patch embedding, patch merging, classifier). Two streams of all calibration images go from unit to unit, one through
the float graph, one through the quantized graph; at each unit the quantized one is trained on mini-batches towards the
float one's output, then both advance. No unit is ever run twice from the start of the network.

What can be trained (:attr:`Settings.optimise`): the rounding of the weights (:mod:`.rounding`), the scales of the
activations (:mod:`.scales`), the float weights themselves (straight through their quantizer). The result is again a
graph and quantizers: rounded weights are written back as the values that their quantizer keeps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as pack
from torch import Tensor, fx

from quantlens.calibration import CHUNK, MEMORY, Calibration
from quantlens.errors import QuantlensError, StorageError, UnknownNameError, UnsupportedError
from quantlens.graph import Edge, Graph
from quantlens.graph.sites import dynamic_nodes
from quantlens.quantizers import Plan, Quantizer, Uniform, restore
from quantlens.reconstruction.rounding import AdaRound, annealed_beta
from quantlens.reconstruction.scales import LearnedScale, fake_quantize, learnable

VERSION = 1
"""Part of every checkpoint's fingerprint; raise it when results change."""

ROUNDING, SCALES, WEIGHTS = "rounding", "scales", "weights"

Progress = Callable[[int, int], None]


# -- units ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Unit:
    """A part of the graph that runs alone: values of ``sources`` in, values of ``results`` out (nearly always one
    each). edges: the edges of its sites."""

    name: str
    sources: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...] = field(repr=False)
    edges: tuple[Edge, ...] = field(repr=False)


def find_units(graph: Graph) -> list[Unit]:
    """The whole graph as units in execution order: its blocks, and the stretches before, between and behind them,
    named by the first and last layer with a weight."""
    dynamic = dynamic_nodes(graph)
    owner = {node: block.name for block in graph.sites.blocks for node in block.nodes if node in dynamic}
    parts: list[tuple[str, list[fx.Node]]] = []
    places: dict[str, list[fx.Node]] = {}
    for node in graph.fx.nodes:
        if node.op != "call_function" or node not in dynamic:
            continue
        home = owner.get(node)
        if home is not None:
            if home not in places:
                places[home] = []
                parts.append((home, places[home]))
            places[home].append(node)
        else:
            if not parts or parts[-1][0] in places:
                parts.append(("", []))
            parts[-1][1].append(node)
    of_node = graph.sites.edges_by_node
    units = []
    for name, inside in parts:
        members = set(inside)
        sources = dict.fromkeys(s for n in inside for s in n.all_input_nodes if s in dynamic and s not in members)
        results = [n for n in inside if n is graph.output or any(u not in members for u in n.users)]
        edges = tuple(e for n in inside for e in of_node.get(n, []))
        layers = list(dict.fromkeys(e.site for e in edges if e.is_weight))
        title = name or (f"{layers[0]}…{layers[-1]}" if len(layers) > 1 else "".join(layers))
        if not title:
            title = f"{inside[0].name}…{inside[-1].name}"
        nodes = tuple(sorted({*inside, *_constant_parents(inside, dynamic)}, key=_order(graph).__getitem__))
        units.append(Unit(title, tuple(sources), tuple(results), nodes, edges))
    return units


def _order(graph: Graph) -> dict[fx.Node, int]:
    return {node: i for i, node in enumerate(graph.fx.nodes)}


def _constant_parents(nodes: list[fx.Node], dynamic: set[fx.Node]) -> set[fx.Node]:
    """Operations that ``nodes`` need and that do not depend on the pixels (a class token repeated for the batch)."""
    found: set[fx.Node] = set()
    queue = list(nodes)
    while queue:
        for source in queue.pop().all_input_nodes:
            if source.op == "call_function" and source not in dynamic and source not in found:
                if not source.meta.get("symbolic"):
                    found.add(source)
                queue.append(source)
    return found


# -- losses --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Context:
    """What a loss may want to know besides the two outputs.

    unit: name. is_logits: whether the output is the model's. images: numbers of the calibration images in the batch.
    weights: per-element weights that broadcast to the output, or None. scale: mean of ‖y_t‖² over all calibration
    images and tokens, float.
    """

    unit: str
    is_logits: bool
    images: Tensor
    weights: Tensor | None
    scale: float


Loss = Callable[[Tensor, Tensor, Context], Tensor]
"""(ŷ, y, context) -> scalar, a mean over the images; y is the float model's output."""


def mse(got: Tensor, expected: Tensor, context: Context) -> Tensor:
    """Mean squared difference, each element times its weight where weights are given."""
    difference = (got - expected).square()
    return (difference if context.weights is None else difference * context.weights).mean()


EPSILON = 0.01
"""ε of the token norm as a share of the mean of ‖y_t‖²."""


def token_norm(got: Tensor, expected: Tensor, context: Context) -> Tensor:
    """Mean over images and tokens of ‖y_t − ŷ_t‖² / (‖y_t‖² + ε), t over all but the last dimension.

    Every token counts by its relative error, so that a few tokens of extreme norm do not make up the whole loss. ε =
    :data:`EPSILON` of the mean squared norm keeps tokens that are next to zero from doing so instead.
    """
    difference = (got - expected).square()
    if context.weights is not None:
        difference = difference * context.weights
    norm = expected.square().sum(-1) + max(EPSILON * context.scale, torch.finfo(torch.float32).tiny)
    return (difference.sum(-1) / norm).mean()


LOSSES: dict[str, Loss] = {"mse": mse, "token-norm": token_norm}


# -- settings and report -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    """How units are reconstructed.

    optimise: any of "rounding" (AdaRound), "scales" (LSQ), "weights" (the float weights, straight through; not together
        with "rounding"). Weights that are not quantized and formats that cannot learn stay as they are.
    loss: a name of :data:`LOSSES` or a function (:data:`Loss`). It is divided by its value at the start, so that
        ``regularisation`` means the same everywhere.
    element_weights: unit name -> weights that broadcast to the unit's output, one for all images or [N, …].
    inputs: what the unit reads in training: "quantized" (the quantized prefix's output), "float", or "mixed" (element
        by element, the float one with probability ``input_drop``).
    drop: probability that an activation's element is left in float in training (QDrop uses 0.5).
    iterations: steps per unit, split evenly over ``rounds``. After each round the unit is frozen and measured on all
        images; the next round starts from the best result so far with half the learning rate.
    batch_size: images per step. lr_*: learning rates of Adam; scales are learned as multiples of their start, weights
        in units of their scale. They fall to zero along a cosine, but for soft rounding.
    straight_through, regularisation, beta, warmup: see :class:`.rounding.AdaRound` and :func:`.rounding.annealed_beta`;
        the regulariser is the mean over a unit's weights times ``regularisation``.
    units: names of the units to train; None: all.
    """

    optimise: tuple[str, ...] = (ROUNDING, SCALES)
    loss: str | Loss = "mse"
    element_weights: Mapping[str, Tensor] | None = None
    inputs: str = "mixed"
    input_drop: float = 0.5
    drop: float = 0.0
    iterations: int = 200
    rounds: int = 1
    batch_size: int = 16
    lr_rounding: float = 0.02
    lr_scales: float = 1e-3
    lr_weights: float = 0.02
    straight_through: bool = False
    regularisation: float = 1.0
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    units: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.optimise if name not in (ROUNDING, SCALES, WEIGHTS)]
        if unknown:
            raise UnknownNameError("part to optimise", unknown[0], (ROUNDING, SCALES, WEIGHTS))
        if ROUNDING in self.optimise and WEIGHTS in self.optimise:
            raise QuantlensError("either the rounding or the weights themselves can be optimised, not both")
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise UnknownNameError("reconstruction loss", self.loss, LOSSES)
        if self.inputs not in ("quantized", "float", "mixed"):
            raise UnknownNameError("inputs of reconstruction", self.inputs, ("quantized", "float", "mixed"))
        if self.iterations < 0 or self.rounds < 1 or self.batch_size < 1:
            raise QuantlensError("reconstruction needs iterations >= 0, rounds >= 1 and a batch size >= 1")
        if not (0 <= self.input_drop <= 1 and 0 <= self.drop < 1):
            raise QuantlensError("drop probabilities lie in 0 … 1 (drop below 1)")

    def function(self) -> Loss:
        return LOSSES[self.loss] if isinstance(self.loss, str) else self.loss


@dataclass(frozen=True)
class UnitReport:
    """What happened to one unit.

    before, after: loss on all calibration images behind the quantized prefix. rounds: the loss after each round.
    accepted: whether anything was changed. trained: number of learned tensors.
    """

    unit: str
    before: float
    after: float
    rounds: tuple[float, ...]
    accepted: bool
    trained: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """All units in order. ``resumed``: how many were read from a checkpoint."""

    units: tuple[UnitReport, ...]
    resumed: int = 0

    def gain(self) -> float:
        """Geometric mean of after/before over the units that were trained; 1 without any."""
        ratios = [u.after / u.before for u in self.units if u.trained and u.before > 0 and u.after > 0]
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0

    def info(self) -> list[dict[str, Any]]:
        """As JSON-able data."""
        return [{**asdict(u), "rounds": list(u.rounds)} for u in self.units]


# -- the function --------------------------------------------------------------------------------------------------
def reconstruct(
    graph: Graph,
    plan: Plan,
    calibration: Calibration,
    settings: Settings | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Path | str | None = None,
    memory: int = MEMORY,
) -> Report:
    """Reconstruct ``graph`` under ``plan`` unit by unit; changes weights of the graph and quantizers of the plan.

    calibration: images, on the graph's device. progress: called with (done, total) steps. checkpoint: a folder where
    every finished unit is stored; a later call with equal graph, plan, images, settings and seed goes on behind the
    last finished unit, bit-equal. memory: bytes of cached activations kept in memory, the rest goes to a temporary
    file. A unit whose loss on all calibration images got worse keeps its start.

    Random numbers come from a CPU generator, seeded per unit. Raises UnsupportedError for a plan with integer operators
    (train before they are put in), UnknownNameError for unit names that do not exist.
    """
    settings = settings or Settings()
    if plan.operators:
        raise UnsupportedError("reconstruction works on quantizers; put integer operators in after it")
    units = find_units(graph)
    if settings.units is not None:
        known = {u.name for u in units}
        for name in settings.units:
            if name not in known:
                raise UnknownNameError("unit", name, known)
    store = _Checkpoint(checkpoint, graph, plan, calibration, settings, seed) if checkpoint is not None else None
    total, resumed, reports = len(units) * max(settings.iterations, 1), 0, []
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="quantlens-") as folder:
        streams = _Streams(graph, units, calibration, _Room(memory, Path(folder)))
        for index, unit in enumerate(units):
            streams.advance_float(unit)
            found = store.read(index, unit) if store is not None else None
            work = _Work(graph, plan.quantizers, unit, streams, settings, seed, index)
            if found is None:

                def tell(done: int, start: int = index * max(settings.iterations, 1)) -> None:
                    if progress is not None:
                        progress(start + done, total)

                result = work.run(tell)
                if store is not None:
                    store.write(index, unit, result)
            else:
                result, resumed = found, resumed + 1
            for name, value in result.tensors.items():
                graph.set_tensor(name, value.to(graph.device))
            plan.quantizers.update({k: q.to(graph.device) for k, q in result.quantizers.items()})
            reports.append(result.report)
            streams.advance_quantized(unit, work.outputs or streams.outputs(unit, work.frozen_hook()))
            streams.forget(index)
            if progress is not None:
                progress((index + 1) * max(settings.iterations, 1), total)
    return Report(tuple(reports), resumed)


def optimise_scales(
    graph: Graph,
    quantizers: Mapping[str, Quantizer],
    calibration: Calibration,
    *,
    iterations: int = 100,
    rounds: int = 4,
    batch_size: int = 16,
    lr: float = 5e-3,
    loss: str | Loss = "mse",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Quantizer]:
    """The quantizers with activation scales learned by LSQ, unit by unit, on the units' reconstruction loss.

    Weights in ``quantizers`` are used as they are. Nothing that was given is changed. Parameters as in
    :class:`Settings`.
    """
    plan = Plan(dict(quantizers))
    settings = Settings(
        (SCALES,), loss, inputs="quantized", iterations=iterations, rounds=rounds, batch_size=batch_size, lr_scales=lr
    )
    reconstruct(graph, plan, calibration, settings, seed=seed, progress=progress)
    return plan.quantizers


# -- cached activations --------------------------------------------------------------------------------------------
class _Room:
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


class _Cache:
    """One value for all images, [N·k, …]: k rows per image, in the order of the images (k = 1 but for windows)."""

    def __init__(self, room: _Room, count: int):
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


class _Streams:
    """The values between units for all images, of the float graph and of the quantized one."""

    def __init__(self, graph: Graph, units: list[Unit], calibration: Calibration, room: _Room):
        self.graph, self.room, self.count = graph, room, calibration.count
        self.device = graph.device
        images = _Cache(room, self.count)
        for index, chunk in enumerate(calibration):
            images.put(index * CHUNK, len(chunk), chunk)
        self.float: dict[fx.Node, _Cache] = {graph.input: images}
        self.quantized: dict[fx.Node, _Cache] = {graph.input: images}
        self.last_use = {s: i for i, unit in enumerate(units) for s in unit.sources}

    def run(self, unit: Unit, env: dict[fx.Node, Any], images: int, hook: Hook | None) -> list[Tensor]:
        """Values of the unit's results; ``env`` holds its sources."""
        shape = (images, *self.graph.input.meta["shape"][1:])
        env.setdefault(self.graph.input, torch.empty(shape, device="meta"))  # for its batch size alone
        out = self.graph.run(unit.nodes, env, hook=hook, keep=unit.results)
        return [out[node] for node in unit.results]

    def outputs(self, unit: Unit, hook: Hook | None, *, of_float: bool = False) -> dict[fx.Node, _Cache]:
        """The unit's results for all images."""
        inputs = self.float if of_float else self.quantized
        caches = {node: _Cache(self.room, self.count) for node in unit.results}
        for first in range(0, self.count, CHUNK):
            last = min(first + CHUNK, self.count)
            env: dict[fx.Node, Any] = {s: inputs[s].slice(first, last, self.device) for s in unit.sources}
            for node, value in zip(unit.results, self.run(unit, env, last - first, hook), strict=True):
                caches[node].put(first, last - first, value)
        return caches

    def advance_float(self, unit: Unit) -> None:
        self.float.update(self.outputs(unit, None, of_float=True))

    def advance_quantized(self, unit: Unit, outputs: dict[fx.Node, _Cache]) -> None:
        self.quantized.update(outputs)

    def forget(self, done: int) -> None:
        """Free what no unit behind number ``done`` reads."""
        for stream in (self.float, self.quantized):
            for node in [n for n in stream if self.last_use.get(n, -1) <= done]:
                stream.pop(node).free()

    def inputs(self, unit: Unit, images: Tensor, settings: Settings, generator: torch.Generator) -> dict:
        """The unit's sources for a mini-batch, as :attr:`Settings.inputs` says."""
        env: dict[fx.Node, Any] = {}
        for node in unit.sources:
            if settings.inputs == "float" or self.quantized[node] is self.float[node]:
                env[node] = self.float[node].pick(images, self.device)
                continue
            env[node] = self.quantized[node].pick(images, self.device)
            if settings.inputs == "mixed":
                exact = self.float[node].pick(images, self.device)
                env[node] = torch.where(
                    _mask(exact.shape, settings.input_drop, generator, self.device), exact, env[node]
                )
        return env


def _mask(shape: torch.Size, p: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Bool, True with probability p; drawn on the CPU, so that all devices see the same."""
    return (torch.rand(shape, generator=generator) < p).to(device)


# -- one unit ------------------------------------------------------------------------------------------------------
@dataclass
class _Result:
    report: UnitReport
    tensors: dict[str, Tensor] = field(default_factory=dict)
    quantizers: dict[str, Quantizer] = field(default_factory=dict)


class _Latent(torch.nn.Module):
    """A float weight that is trained straight through its quantizer, in units of its scale."""

    def __init__(self, quantizer: Any, weight: Tensor):
        super().__init__()
        self.quantizer = quantizer
        scale = quantizer._spread(quantizer.scale, weight.dim()) if isinstance(quantizer, Uniform) else weight.std()
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("start", weight.detach().clone())
        self.step = torch.nn.Parameter(torch.zeros_like(weight))

    def latent(self) -> Tensor:
        return self.start + self.step * self.scale  # type: ignore[operator]

    def forward(self) -> Tensor:
        return fake_quantize(self.quantizer, self.latent())

    @torch.no_grad()
    def harden(self) -> Tensor:
        return self.quantizer(self.latent())


class _Work:
    """Training of one unit. ``outputs`` holds the accepted unit's results once :meth:`run` has made them."""

    def __init__(
        self,
        graph: Graph,
        quantizers: dict[str, Quantizer],
        unit: Unit,
        streams: _Streams,
        settings: Settings,
        seed: int,
        index: int,
    ):
        self.graph, self.all, self.unit, self.streams, self.settings = graph, quantizers, unit, streams, settings
        self.loss, self.device = settings.function(), graph.device
        self.generator = torch.Generator().manual_seed((seed << 20) + index)
        self.outputs: dict[fx.Node, _Cache] | None = None
        self.scale_of: dict[fx.Node, float] = {}
        self.trained: dict[str, Any] = {}

    # -- what is trained
    def _prepare(self) -> None:
        """Make the learners: edge key -> module. Edges that share a quantizer share its learner."""
        optimise, keys = self.settings.optimise, {e.key for e in self.unit.edges}
        if self.settings.units is not None and self.unit.name not in self.settings.units:
            return
        uses: dict[str, int] = {}
        for edge in self.graph.sites.edges.values():
            if edge.is_weight:
                uses[str(edge.value.target)] = uses.get(str(edge.value.target), 0) + 1
        owners: dict[int, set[str]] = {}
        for key, owned in self.all.items():
            owners.setdefault(id(owned), set()).add(key)
        shared: dict[int, LearnedScale] = {}
        for edge in self.unit.edges:
            quantizer = self.all.get(edge.key)
            if quantizer is None:
                continue
            if edge.is_weight:
                name = str(edge.value.target)
                weight = self.graph.tensor(name)
                if uses[name] > 1 or not bool(torch.isfinite(weight).all()):
                    continue
                if ROUNDING in optimise and isinstance(quantizer, Uniform):
                    through = self.settings.straight_through
                    self.trained[edge.key] = AdaRound(quantizer, weight, straight_through=through)
                elif WEIGHTS in optimise:
                    self.trained[edge.key] = _Latent(quantizer, weight)
            elif SCALES in optimise and learnable(quantizer) and owners[id(quantizer)] <= keys:
                if id(quantizer) not in shared:
                    shared[id(quantizer)] = LearnedScale(quantizer)
                self.trained[edge.key] = shared[id(quantizer)]

    # -- hooks
    def frozen_hook(self, result: _Result | None = None) -> Hook:
        """Applies the plan's quantizers (with ``result``'s changes), weights encoded once."""
        changed = result.quantizers if result is not None else {}
        tensors = result.tensors if result is not None else {}
        weights: dict[str, Tensor] = {}
        for edge in self.unit.edges:
            if edge.is_weight and edge.key in self.all:
                name = str(edge.value.target)
                weights[edge.key] = self.all[edge.key](tensors.get(name, self.graph.tensor(name)))

        def hook(key: str, value: Tensor) -> Tensor:
            if key in weights:
                return weights[key]
            quantizer = changed.get(key) or self.all.get(key)
            return value if quantizer is None else quantizer(value)

        return hook

    def training_hook(self) -> Hook:
        """As the frozen hook, with what is trained in its present state, and elements dropped at random."""
        trained, everything, p = self.trained, self.all, self.settings.drop
        weights: dict[str, Tensor] = {}
        for edge in self.unit.edges:
            if edge.is_weight and edge.key in everything and edge.key not in trained:
                weights[edge.key] = everything[edge.key](self.graph.tensor(str(edge.value.target)))

        def hook(key: str, value: Tensor) -> Tensor:
            if key in weights:
                return weights[key]
            learner = trained.get(key)
            if isinstance(learner, AdaRound | _Latent):
                return learner()
            quantizer = everything.get(key)
            if quantizer is None:
                return value
            kept = _mask(value.shape, p, self.generator, self.device) if p > 0 else None
            return learner(value, kept) if learner is not None else fake_quantize(quantizer, value, kept)

        return hook

    # -- the loss
    def _context(self, node: fx.Node, images: Tensor) -> Context:
        weights = (self.settings.element_weights or {}).get(self.unit.name)
        if weights is not None:
            weights = weights.to(self.device)
            if weights.dim() == len(node.meta["shape"]) and weights.shape[0] == self.streams.count:
                weights = weights.index_select(0, images.to(self.device))
        return Context(self.unit.name, node is self.graph.output, images, weights, self.scale_of[node])

    def _measure(self, outputs: dict[fx.Node, _Cache]) -> float:
        """The loss over all images."""
        total, count = 0.0, self.streams.count
        for first in range(0, count, CHUNK):
            last = min(first + CHUNK, count)
            images = torch.arange(first, last)
            for node, cache in outputs.items():
                got = cache.slice(first, last, self.device)
                expected = self.streams.float[node].slice(first, last, self.device)
                total += float(self.loss(got, expected, self._context(node, images))) * (last - first) / count
        return total

    def _scales(self) -> None:
        """Mean of ‖y_t‖² of every result of the float unit."""
        for node in self.unit.results:
            tensor: Tensor = self.streams.float[node].tensor  # type: ignore[assignment]
            parts = [float(p.square().sum(dtype=torch.float64)) for p in tensor.split(CHUNK)]
            self.scale_of[node] = sum(parts) / max(tensor.numel() // tensor.shape[-1], 1)

    # -- the run
    def run(self, tell: Callable[[int], None]) -> _Result:
        """Train, measure, keep the better. Leaves graph and plan as they are."""
        started = time.perf_counter()
        self._prepare()
        start = self.streams.outputs(self.unit, self.frozen_hook())
        self.outputs = start
        if not self.trained or not self.unit.results:
            return _Result(UnitReport(self.unit.name, 0.0, 0.0, (), False, 0, 0.0))
        self._scales()
        before = self._measure(start)
        best, lowest, history = _Result(UnitReport("", 0, 0, (), False, 0, 0)), before, []
        if math.isfinite(before) and before > 0 and self.settings.iterations > 0:
            rounds = self.settings.rounds
            for number in range(rounds):
                edges = [self.settings.iterations * i // rounds for i in (number, number + 1)]
                self._train(before, edges[0], edges[1], 0.5**number, tell)
                result = self._freeze()
                outputs = self.streams.outputs(self.unit, self.frozen_hook(result))
                after = self._measure(outputs)
                history.append(after)
                worse = outputs
                if after < lowest:
                    worse, self.outputs, lowest, best = self.outputs, outputs, after, result
                    self._kept = [p.detach().clone() for p in self._parameters()]
                elif number + 1 < rounds:
                    self._restore()
                for cache in worse.values():
                    cache.free()
        best.report = UnitReport(
            self.unit.name,
            before,
            lowest,
            tuple(history),
            lowest < before,
            len(self._learners()),
            round(time.perf_counter() - started, 3),
        )
        return best

    def _learners(self) -> list[Any]:
        """The learners, each once."""
        return list({id(m): m for m in self.trained.values()}.values())

    def _parameters(self) -> list[Tensor]:
        return [p for m in self._learners() for p in m.parameters()]

    def _restore(self) -> None:
        """Set the learners back to the best state so far."""
        kept = getattr(self, "_kept", None)
        if kept is None:
            self.trained = {}
            self._prepare()
            return
        for parameter, value in zip(self._parameters(), kept, strict=True):
            parameter.data.copy_(value)

    def _train(self, start: float, first: int, last: int, factor: float, tell: Callable[[int], None]) -> None:
        """Steps ``first`` … ``last`` − 1 of Adam."""
        settings = self.settings
        learners = self._learners()
        rates: dict[type, float] = {
            AdaRound: settings.lr_rounding,
            LearnedScale: settings.lr_scales,
            _Latent: settings.lr_weights,
        }
        parameters: dict[type, list[Tensor]] = {}
        for learner in learners:
            parameters.setdefault(type(learner), []).extend(learner.parameters())
        groups: list[dict[str, Any]] = [
            {"params": found, "lr": rates[kind] * factor, "start": rates[kind] * factor, "kind": kind}
            for kind, found in parameters.items()
        ]
        roundings = [m for m in learners if isinstance(m, AdaRound)] if not settings.straight_through else []
        weights = sum(m.alpha.numel() for m in roundings)
        optimiser = torch.optim.Adam(groups)
        hook, batches = self.training_hook(), self._batches()
        for step in range(first, last):
            share = (step - first) / max(last - first, 1)
            for group in optimiser.param_groups:
                soft = group["kind"] is AdaRound and not settings.straight_through
                group["lr"] = group["start"] * (1.0 if soft else 0.5 * (1 + math.cos(math.pi * share)))
            images = next(batches)
            env = self.streams.inputs(self.unit, images, settings, self.generator)
            with torch.enable_grad(), _outside_inference():
                values = self.streams.run(self.unit, env, len(images), hook)
                loss = torch.zeros((), device=self.device)
                for node, got in zip(self.unit.results, values, strict=True):
                    expected = self.streams.float[node].pick(images, self.device)
                    loss = loss + self.loss(got, expected, self._context(node, images))
                loss = loss / start
                beta = annealed_beta(share, start=settings.beta[0], end=settings.beta[1], warmup=settings.warmup)
                if roundings and beta is not None:
                    loss = loss + sum(m.regulariser(beta) for m in roundings) * (settings.regularisation / weights)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
            optimiser.step()
            tell(step + 1)

    def _batches(self) -> Iterator[Tensor]:
        """Numbers of the images of each mini-batch: a shuffled pass over all images, again and again."""
        size, count = min(self.settings.batch_size, self.streams.count), self.streams.count
        while True:
            order = torch.randperm(count, generator=self.generator)
            for first in range(0, count - size + 1, size):
                yield order[first : first + size]

    def _freeze(self) -> _Result:
        """What training made, as tensors and quantizers."""
        result = _Result(UnitReport("", 0, 0, (), False, 0, 0))
        edges = self.graph.sites.edges
        frozen: dict[int, Quantizer] = {}
        for key, learner in self.trained.items():
            if isinstance(learner, LearnedScale):
                frozen.setdefault(id(learner), learner.freeze())
                result.quantizers[key] = frozen[id(learner)]
            else:
                result.tensors[str(edges[key].value.target)] = learner.harden()
        return result


@contextmanager
def _outside_inference() -> Iterator[None]:
    """Autograd is on even if the caller is in inference mode."""
    with torch.inference_mode(False):
        yield


# -- checkpoints ---------------------------------------------------------------------------------------------------
class _Checkpoint:
    """Finished units in a folder, one safetensors file each, written atomically and keyed by a fingerprint of all
    that determines them."""

    def __init__(
        self,
        folder: Path | str,
        graph: Graph,
        plan: Plan,
        calibration: Calibration,
        settings: Settings,
        seed: int,
    ):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make the folder {self.folder}: {error.strerror}") from error
        self.key = fingerprint(graph, plan.quantizers, calibration, settings, seed)

    def _path(self, index: int, unit: Unit) -> Path:
        return self.folder / f"{index:03d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', unit.name)}.safetensors"

    def read(self, index: int, unit: Unit) -> _Result | None:
        """A stored unit; None if there is none that fits, or the file is damaged."""
        path = self._path(index, unit)
        if not path.exists():
            return None
        try:
            with safe_open(str(path), "pt") as file:
                about = file.metadata() or {}
                if about.get("fingerprint") != self.key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            record = json.loads(about["record"])
        except (SafetensorError, OSError, KeyError, ValueError):
            return None
        made: list[Quantizer] = []
        for number, config in enumerate(record["formats"]):
            prefix = f"q{number}."
            made.append(restore(config, {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}))
        report = {**record["report"], "rounds": tuple(record["report"]["rounds"])}
        return _Result(
            UnitReport(**report),
            {k[2:]: v for k, v in tensors.items() if k.startswith("w.")},
            {key: made[number] for key, number in record["quantizers"].items()},
        )

    def write(self, index: int, unit: Unit, result: _Result) -> None:
        tensors = {f"w.{k}": v.detach().cpu().contiguous() for k, v in result.tensors.items()}
        numbers: dict[int, int] = {}
        configs: list[dict[str, Any]] = []
        for quantizer in result.quantizers.values():
            if id(quantizer) not in numbers:
                numbers[id(quantizer)] = number = len(configs)
                configs.append(quantizer.config())
                tensors |= {f"q{number}.{k}": v.cpu().contiguous() for k, v in quantizer.tensors().items()}
        record = {
            "report": {**asdict(result.report), "rounds": list(result.report.rounds)},
            "formats": configs,
            "quantizers": {key: numbers[id(q)] for key, q in result.quantizers.items()},
        }
        path = self._path(index, unit)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as file:
                file.write(pack(tensors, {"fingerprint": self.key, "record": json.dumps(record)}))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(f"cannot write {path}: {error.strerror}") from error


def fingerprint(
    graph: Graph, quantizers: Mapping[str, Quantizer], calibration: Calibration, settings: Settings, seed: int
) -> str:
    """Hex digest of everything that determines a reconstruction: graph, tensors, quantizers, images, settings, seed,
    torch's version and the kind of device."""
    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                add(str(value.dtype), str(tuple(value.shape)))
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                text = str(value).encode()
                digest.update(f"{len(text)}:".encode() + text)

    add(VERSION, torch.__version__, graph.device.type, seed)
    for node in graph.fx.nodes:
        add(node.op, node.target, node.args, node.kwargs)
    for name, tensor in graph.tensors().items():
        add(name, tensor)
    shared: dict[int, int] = {}
    for key in sorted(quantizers):
        quantizer = quantizers[key]
        add(key, json.dumps(quantizer.config(), sort_keys=True), shared.setdefault(id(quantizer), len(shared)))
        for name, tensor in sorted(quantizer.tensors().items()):
            add(name, tensor)
    for item in fields(settings):
        value = getattr(settings, item.name)
        if callable(value):
            code = getattr(value, "__code__", None)
            extra = (code.co_code.hex(), code.co_consts) if code is not None else ()
            value = (getattr(value, "__module__", ""), getattr(value, "__qualname__", repr(type(value))), *extra)
        elif isinstance(value, Mapping):
            for name in sorted(value):
                add(item.name, name, value[name])
            continue
        add(item.name, value)
    for chunk in calibration:
        add(chunk)
    return digest.hexdigest()


__all__ = [
    "LOSSES",
    "Context",
    "Loss",
    "Report",
    "Settings",
    "Unit",
    "UnitReport",
    "find_units",
    "fingerprint",
    "mse",
    "optimise_scales",
    "reconstruct",
    "token_norm",
]
