"""Block reconstruction: a part of the network is tuned so that, quantized, it reproduces the output of the float part
(BRECQ, Li et al., ICLR 2021, section 3.2; QDrop, Wei et al., ICLR 2022, section 3.3).

The network is cut into :class:`Unit` s, one after the other: every transformer block, and what lies between two blocks
(patch embedding, patch merging, classifier). Two streams of all calibration images go from unit to unit, one through
the float graph, one through the quantized graph; at each unit the quantized one is trained on mini-batches towards the
float one's output, then both advance. No unit is ever run twice from the start of the network. The result is again a
graph and quantizers: rounded weights are written back as the values that their quantizer keeps.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, fx

from quantlens.calibration import CHUNK, MEMORY, ActivationStore, Calibration, held_memory
from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.formats import Quantizer
from quantlens.graph import Graph
from quantlens.metrics.divergence import objects_of
from quantlens.qmodel import Plan
from quantlens.reconstruction.scales import AdaRound, LearnedScale, annealed_beta
from quantlens.reconstruction.settings import (
    LOSSES,
    Checkpoint,
    Context,
    Report,
    Result,
    Settings,
    UnitReport,
)
from quantlens.reconstruction.trainer import Group, Latent, Learners, Vector, train
from quantlens.reconstruction.units import Outputs, Streams, Unit, find_units, frozen_hook, run_unit, whole_network

STRENGTH = 0.005
"""Weight of soft rounding's regulariser, a sum over the weights, beside a loss that starts at 1: the code of FIMA-Q and
APHQ-ViT has 0.01 beside one that starts at 2."""


def reconstruct(
    graph: Graph,
    plan: Plan,
    calibration: Calibration,
    settings: Settings | None = None,
    *,
    seed: int = 0,
    reference: Graph | None = None,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: Path | str | None = None,
    memory: int = MEMORY,
    unrounded: Mapping[str, Tensor] | None = None,
) -> Report:
    """Reconstruct ``graph`` under ``plan`` unit by unit; changes weights of the graph and quantizers of the plan.

    calibration: images, on the graph's device. reference: the float model to come near to where ``graph`` no longer is
    it: a graph with the same units. progress: called with (done, total) steps. checkpoint: a folder for the finished
    units; a later call with equal graph, plan, images, settings and seed goes on after the last of them, bit-equal.
    memory: bytes of cached activations kept in memory, the rest goes to a temporary file. unrounded: by name, what
    weights of the graph were rounded from; learning to round them starts from the graph's.

    Random numbers come from a CPU generator, seeded per unit. Raises UnsupportedError for a plan with integer operators
    (train before they are put in).
    """
    settings = settings or Settings()
    units, originals = _units(graph, plan, reference or graph, settings.whole)
    saved = None
    if checkpoint is not None:
        saved = Checkpoint(checkpoint, graph, plan, calibration, settings, seed, reference, unrounded)
    each, resumed = max(settings.iterations, 1), 0
    reports: list[UnitReport] = []

    def tell(done: int) -> None:
        if progress is not None:
            progress(len(reports) * each + done, len(units) * each)

    with torch.no_grad(), held_memory(), ActivationStore(memory) as store:
        streams = Streams(graph, units, calibration, store)
        for index, (unit, original) in enumerate(zip(units, originals, strict=True)):
            streams.float.update(streams.outputs(unit, original=(reference or graph, original)))
            outputs, result = None, saved.read(index, unit) if saved else None
            resumed += result is not None
            if result is None:
                learners = Learners.of(graph, plan.quantizers, unit, settings, unrounded)
                training = _UnitTraining(
                    graph, plan.quantizers, unit, streams, settings, learners, (seed << 20) + index
                )
                outputs, result = training.run(tell)
                if saved:
                    saved.write(index, unit, result)
            for name, value in result.tensors.items():
                graph.set_tensor(name, value.to(graph.device))
            plan.quantizers.update({k: q.to(graph.device) for k, q in result.quantizers.items()})
            streams.quantized.update(outputs or streams.outputs(unit, frozen_hook(graph, unit, plan.quantizers)))
            streams.forget(index)
            tell(each)
            reports.append(result.report)
    return Report(tuple(reports), resumed)


def _units(graph: Graph, plan: Plan, reference: Graph, whole: bool) -> tuple[list[Unit], list[Unit]]:
    """The units of a graph and those of its reference. Raises UnsupportedError for what cannot be reconstructed."""
    if plan.operators:
        raise UnsupportedError("reconstruction works on quantizers; put integer operators in after it")
    units, originals = ([whole_network(g)] if whole else find_units(g) for g in (graph, reference))
    if [u.name for u in units] != [u.name for u in originals]:
        raise UnsupportedError("the reference of a reconstruction must be cut into the same units as its graph")
    return units, originals


Made = tuple[dict[str, Tensor], dict[str, Quantizer]]
"""Tensors of the graph by name, quantizers by edge key."""


class _UnitTraining:
    """Training of one unit."""

    def __init__(
        self,
        graph: Graph,
        quantizers: dict[str, Quantizer],
        unit: Unit,
        streams: Streams,
        settings: Settings,
        learners: Learners,
        seed: int,
    ):
        self.graph, self.quantizers, self.unit, self.streams = graph, quantizers, unit, streams
        self.settings, self.device = settings, graph.device
        self.loss = LOSSES[settings.loss] if isinstance(settings.loss, str) else settings.loss
        self.generator, self.learners = torch.Generator().manual_seed(seed), learners
        held = torch.zeros(streams.count, dtype=torch.bool)
        held[list(settings.held_out)] = True
        self.trained = (~held).nonzero()[:, 0]
        if not len(self.trained):
            raise QuantlensError("every image is held out; leave some to train on")
        self.measured = held.nonzero()[:, 0] if held.any() else self.trained

    def run(self, tell: Callable[[int], None]) -> tuple[Outputs, Result]:
        """Train in rounds, measure after each, keep the best. Returns the kept unit's results for all images, and what
        is to be changed; leaves graph and quantizers as they are. tell: called with the number of steps done."""
        started, trained = time.perf_counter(), len(self.learners.modules())
        outputs = self.streams.outputs(self.unit, frozen_hook(self.graph, self.unit, self.quantizers))
        compared = [node for node in self.unit.results if self.streams.float[node].dtype.is_floating_point]
        sizes = {node: self._size(node) for node in compared} if trained else {}
        self.scale_of = {node: size for node, size in sizes.items() if math.isfinite(size)}  # scores may be −∞
        before = self._measure(outputs) if trained else 0.0
        lowest, state, history = before, self.learners.state(), list[float]()
        made: Made = ({}, {})
        steps, rounds = self.settings.iterations, self.settings.rounds
        for number in range(rounds if math.isfinite(before) and before > 0 and steps > 0 else 0):
            first, last = steps * number // rounds, steps * (number + 1) // rounds
            self.learners.restore(state)
            self._train(before, first, last, 0.5**number, tell)
            tried = self.learners.freeze(self.graph.sites.edges)
            hook = frozen_hook(self.graph, self.unit, {**self.quantizers, **tried[1]}, tried[0])
            constants = {node: value.detach() for node, value in self.learners.constants().items()}
            new = self.streams.outputs(self.unit, hook, constants)
            history.append(self._measure(new))
            if history[-1] < lowest or not self.settings.guarded:
                new, outputs, lowest, made, state = outputs, new, history[-1], tried, self.learners.state()
            for values in new.values():
                values.free()
        seconds = round(time.perf_counter() - started, 3)
        report = UnitReport(self.unit.name, before, lowest, history, any(made), trained, seconds)
        return outputs, Result(report, *made)

    # -- the loss
    def _context(self, node: fx.Node, images: Tensor) -> Context:
        number = self.unit.results.index(node)
        return Context(
            self.unit.name, node is self.graph.output, images, self.scale_of[node], number, self._objects(node, images)
        )

    def _objects(self, node: fx.Node, images: Tensor) -> Tensor | None:
        """Where a detector's boxes are made: the float model's probability of an object for each."""
        if node is not self.graph.boxes:
            return None
        logits, sigmoid = self.streams.float.get(self.graph.output), getattr(self.loss, "outputs", "") == "sigmoid"
        if logits is None:  # boxes that are made before the logits
            return torch.ones((), device=self.device)
        return objects_of(logits.pick(images).flatten(0, 1), sigmoid)

    def _measure(self, outputs: Outputs) -> float:
        """The loss over all images, or those that are held out."""
        total = 0.0
        for images in self.measured.split(CHUNK):
            for node in self.scale_of:
                got, expected = (x[node].pick(images).flatten(0, 1) for x in (outputs, self.streams.float))
                loss = self.loss(got, expected, self._context(node, images))
                total += float(loss) * len(images) / len(self.measured)
        return total

    def _size(self, node: fx.Node) -> float:
        """Mean of ‖y_t‖² of a result of the float unit."""
        values = self.streams.float[node]
        parts = [float(values.rows(*ends).square().sum(dtype=torch.float64)) for ends in self.streams.chunks]
        return sum(parts) / max(values.shape.numel() // values.shape[-1], 1)

    # -- the steps
    def _train(self, start: float, first: int, last: int, factor: float, tell: Callable[[int], None]) -> None:
        """Steps ``first`` … ``last`` − 1, with ``factor`` times the rates, on the loss divided by ``start``."""
        settings, batches = self.settings, self._batches()
        hook = self.learners.hook(self.graph, self.unit, self.quantizers, settings.drop, self.generator)
        soft = [m for m in self.learners.modules() if isinstance(m, AdaRound) and not m.straight_through]

        def loss(share: float) -> Tensor:
            images = next(batches)
            env = self.streams.inputs(self.unit, images, settings.inputs, settings.input_drop, self.generator)
            env.update(self.learners.constants())
            total = torch.zeros((), device=self.device)
            outputs = dict(zip(self.unit.results, run_unit(self.graph, self.unit, env, len(images), hook), strict=True))
            for node in self.scale_of:
                expected = self.streams.float[node].pick(images).flatten(0, 1)
                total = total + self.loss(outputs[node], expected, self._context(node, images))
            total = total / start
            beta = annealed_beta(share)
            if soft and beta is not None:
                total = total + STRENGTH * sum(m.regulariser(beta) for m in soft)
            return total

        train(self._groups(factor), last - first, loss, lambda done: tell(first + done))

    def _groups(self, factor: float) -> list[Group]:
        """The parameters by kind, with their learning rates; that of soft rounding stays."""
        settings, found = self.settings, dict[type, list[Tensor]]()
        for module in self.learners.modules():
            found.setdefault(type(module), []).extend(module.parameters())
        rates: dict[type, float] = {
            AdaRound: settings.lr_rounding,
            LearnedScale: settings.lr_scales,
            Latent: settings.lr_weights,
            Vector: settings.lr_vectors,
        }
        constant = () if settings.straight_through else (AdaRound,)
        return [Group(found[kind], rates[kind] * factor, falling=kind not in constant) for kind in found]

    def _batches(self) -> Iterator[Tensor]:
        """Numbers of the images of each mini-batch: a shuffled pass over those that are trained on, again and again."""
        count = len(self.trained)
        size = min(self.settings.batch_size, count)
        while True:
            order = self.trained[torch.randperm(count, generator=self.generator)]
            for first in range(0, count - size + 1, size):
                yield order[first : first + size]
