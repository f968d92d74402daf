"""Block reconstruction: a part of the network is tuned so that, quantized, it puts out what the float part puts out
(BRECQ, Li et al., ICLR 2021, section 3.2; QDrop, Wei et al., ICLR 2022, section 3.3).

The network is cut into :class:`Unit` s, one after the other: every transformer block, and what lies between two blocks
(patch embedding, patch merging, classifier). Two streams of all calibration images go from unit to unit, one through
the float graph, one through the quantized graph; at each unit the quantized one is trained on mini-batches towards the
float one's output, then both advance. No unit is ever run twice from the start of the network.

What can be trained (:attr:`Settings.optimise`): the rounding of the weights (:mod:`.rounding`), the scales of the
activations (:mod:`.scales`), the float weights themselves (straight through their quantizer), biases and LayerNorms
(:mod:`.latent`). The result is again a graph and quantizers: rounded weights are written back as the values that their
quantizer keeps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.calibration import CHUNK, MEMORY, ActivationStore, Calibration
from quantlens.calibration.process_memory import held_memory
from quantlens.errors import UnknownNameError, UnsupportedError
from quantlens.formats import Quantizer, Uniform
from quantlens.graph import Graph
from quantlens.qmodel import Plan
from quantlens.reconstruction.checkpoints import Checkpoint
from quantlens.reconstruction.latent import Latent, Vector, trained_vectors
from quantlens.reconstruction.losses import Context, Loss
from quantlens.reconstruction.rounding import AdaRound, annealed_beta
from quantlens.reconstruction.scales import LearnedScale, fake_quantize, learnable
from quantlens.reconstruction.settings import ROUNDING, SCALES, VECTORS, WEIGHTS, Report, Result, Settings, UnitReport
from quantlens.reconstruction.streams import Hook, ImageCache, Streams, frozen_hook, random_mask
from quantlens.reconstruction.units import Unit, find_units

Progress = Callable[[int, int], None]


def reconstruct(
    graph: Graph,
    plan: Plan,
    calibration: Calibration,
    settings: Settings | None = None,
    *,
    seed: int = 0,
    reference: Graph | None = None,
    progress: Progress | None = None,
    checkpoint: Path | str | None = None,
    memory: int = MEMORY,
) -> Report:
    """Reconstruct ``graph`` under ``plan`` unit by unit; changes weights of the graph and quantizers of the plan.

    calibration: images, on the graph's device. reference: the float model to come near to where ``graph`` no longer is
    it (weights were trained, activation functions replaced): a graph with the same units. progress: called with (done,
    total) steps. checkpoint: a folder where every finished unit is stored; a later call with equal graph, plan,
    images, settings and seed goes on behind the last finished unit, bit-equal. memory: bytes of cached activations
    kept in memory, the rest goes to a temporary file. A unit whose loss on all calibration images got worse keeps its
    start.

    Random numbers come from a CPU generator, seeded per unit. Raises UnsupportedError for a plan with integer operators
    (train before they are put in), UnknownNameError for unit names that do not exist.
    """
    settings = settings or Settings()
    if plan.operators:
        raise UnsupportedError("reconstruction works on quantizers; put integer operators in after it")
    units, originals = find_units(graph), find_units(reference or graph)
    if [u.name for u in units] != [u.name for u in originals]:
        raise UnsupportedError("the reference of a reconstruction must be cut into the same units as its graph")
    if settings.units is not None:
        known = {u.name for u in units}
        for name in settings.units:
            if name not in known:
                raise UnknownNameError("unit", name, known)
    saved = None
    if checkpoint is not None:
        saved = Checkpoint(checkpoint, graph, plan, calibration, settings, seed, reference)
    total, resumed, reports = len(units) * max(settings.iterations, 1), 0, []
    with torch.no_grad(), held_memory(), ActivationStore(memory) as store:
        streams = Streams(graph, units, calibration, store)
        for index, (unit, original) in enumerate(zip(units, originals, strict=True)):
            streams.advance_float(unit, reference or graph, original)
            found = saved.read(index, unit) if saved is not None else None
            work = _Work(graph, plan.quantizers, unit, streams, settings, seed, index)
            if found is None:

                def tell(done: int, start: int = index * max(settings.iterations, 1)) -> None:
                    if progress is not None:
                        progress(start + done, total)

                result = work.run(tell)
                if saved is not None:
                    saved.write(index, unit, result)
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


# -- one unit ------------------------------------------------------------------------------------------------------
class _Work:
    """Training of one unit. ``outputs`` holds the accepted unit's results once :meth:`run` has made them."""

    def __init__(
        self,
        graph: Graph,
        quantizers: dict[str, Quantizer],
        unit: Unit,
        streams: Streams,
        settings: Settings,
        seed: int,
        index: int,
    ):
        self.graph, self.all, self.unit, self.streams, self.settings = graph, quantizers, unit, streams, settings
        self.loss, self.device = settings.function(), graph.device
        self.generator = torch.Generator().manual_seed((seed << 20) + index)
        self.outputs: dict[fx.Node, ImageCache] | None = None
        self.scale_of: dict[fx.Node, float] = {}
        self.trained: dict[str, Any] = {}
        self.vectors: dict[fx.Node, Vector] = {}

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
            if quantizer is None and not (edge.is_weight and self.settings.float_weights):
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
                    self.trained[edge.key] = Latent(quantizer, weight)
            elif quantizer is None:
                continue
            elif SCALES in optimise and learnable(quantizer) and owners[id(quantizer)] <= keys:
                if id(quantizer) not in shared:
                    shared[id(quantizer)] = LearnedScale(quantizer)
                self.trained[edge.key] = shared[id(quantizer)]
        if VECTORS in optimise:
            own = set(self.unit.nodes)
            found = [n for n in trained_vectors(self.graph) if own.issuperset(n.users)]
            self.vectors = {node: Vector(self.graph.tensor(str(node.target))) for node in found}

    # -- hooks
    def frozen_hook(self, result: Result | None = None) -> Hook:
        """Applies the plan's quantizers (with ``result``'s changes)."""
        if result is None:
            return frozen_hook(self.graph, self.unit, self.all)
        return frozen_hook(self.graph, self.unit, {**self.all, **result.quantizers}, result.tensors)

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
            if isinstance(learner, AdaRound | Latent):
                return learner()
            quantizer = everything.get(key)
            if quantizer is None:
                return value
            kept = random_mask(value.shape, p, self.generator, self.device) if p > 0 else None
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

    def _measure(self, outputs: dict[fx.Node, ImageCache]) -> float:
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
            values = self.streams.float[node].values
            ends = [(i, min(i + CHUNK, len(values))) for i in range(0, len(values), CHUNK)]
            parts = [float(values.rows(*pair).square().sum(dtype=torch.float64)) for pair in ends]
            self.scale_of[node] = sum(parts) / max(values.shape.numel() // values.shape[-1], 1)

    # -- the run
    def run(self, tell: Callable[[int], None]) -> Result:
        """Train, measure, keep the better. Leaves graph and plan as they are."""
        started = time.perf_counter()
        self._prepare()
        start = self.streams.outputs(self.unit, self.frozen_hook())
        self.outputs = start
        if not self._learners() or not self.unit.results:
            return Result(UnitReport(self.unit.name, 0.0, 0.0, (), False, 0, 0.0))
        self._scales()
        before = self._measure(start)
        best, lowest, history = Result(UnitReport("", 0, 0, (), False, 0, 0)), before, []
        if math.isfinite(before) and before > 0 and self.settings.iterations > 0:
            rounds = self.settings.rounds
            for number in range(rounds):
                edges = [self.settings.iterations * i // rounds for i in (number, number + 1)]
                self._train(before, edges[0], edges[1], 0.5**number, tell)
                result = self._freeze()
                vectors = {node: result.tensors[str(node.target)] for node in self.vectors}
                outputs = self.streams.outputs(self.unit, self.frozen_hook(result), vectors)
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
        return list({id(m): m for m in (*self.trained.values(), *self.vectors.values())}.values())

    def _parameters(self) -> list[Tensor]:
        return [p for m in self._learners() for p in m.parameters()]

    def _restore(self) -> None:
        """Set the learners back to the best state so far."""
        kept = getattr(self, "_kept", None)
        if kept is None:
            self.trained, self.vectors = {}, {}
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
            Latent: settings.lr_weights,
            Vector: settings.lr_vectors,
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
            env = self.streams.inputs(self.unit, images, settings.inputs, settings.input_drop, self.generator)
            with torch.enable_grad(), _outside_inference():
                env.update({node: vector() for node, vector in self.vectors.items()})
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

    def _freeze(self) -> Result:
        """What training made, as tensors and quantizers."""
        result = Result(UnitReport("", 0, 0, (), False, 0, 0))
        edges = self.graph.sites.edges
        frozen: dict[int, Quantizer] = {}
        for key, learner in self.trained.items():
            if isinstance(learner, LearnedScale):
                frozen.setdefault(id(learner), learner.freeze())
                result.quantizers[key] = frozen[id(learner)]
            else:
                result.tensors[str(edges[key].value.target)] = learner.harden()
        for node, vector in self.vectors.items():
            result.tensors[str(node.target)] = vector().detach()
        return result


@contextmanager
def _outside_inference() -> Iterator[None]:
    """Autograd is on even if the caller is in inference mode."""
    with torch.inference_mode(False):
        yield
