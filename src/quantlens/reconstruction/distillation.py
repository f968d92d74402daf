"""Distillation of the whole quantized network from the float one, on views of the calibration images.

Block reconstruction trains every block towards its own float output; what it cannot see is which errors the blocks
behind make up for and which they make worse. Here the whole network is trained at once, straight through all
quantizers, towards the float network's logits and features, without labels: scales of activations, biases, and what is
left of LayerNorms. Some dozens of steps do, because what it starts from is already good. Weights can be trained, too
(``lr_weights``): by a fraction of their quantization step, so that some of them round to the neighbouring code. With
256 images that learns these by heart: :mod:`quantlens.methods.quantlens_best` has figures.

    L = mean over images of KL(softmax(f) ‖ softmax(f̂)) + λ·‖h − ĥ‖²/‖h‖²

f, h are the float network's logits and penultimate features on a view of an image (:mod:`.views`), f̂, ĥ the quantized
one's. The first term keeps predictions and their confidence, the second the norm and direction of the features: what
scores of out-of-distribution detection live on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.calibration import CHUNK, MEMORY, ActivationStore, Calibration
from quantlens.calibration.process_memory import held_memory
from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.formats import Quantizer, Uniform
from quantlens.graph import Graph
from quantlens.graph.sites import classifier_terms
from quantlens.qmodel import Plan
from quantlens.reconstruction.checkpoints import Progressed, fingerprint
from quantlens.reconstruction.latent import Latent, Vector, trained_vectors
from quantlens.reconstruction.losses import divergence
from quantlens.reconstruction.scales import LearnedScale, fake_quantize, learnable
from quantlens.reconstruction.streams import ImageCache
from quantlens.reconstruction.views import draw

Progress = Callable[[int, int], None]

INSIDE = 0.45
"""How far from its code, in steps, a weight starts at most: it rounds to that code, and to another one soon if the
gradient wants it."""

WARM_UP = 0.05
"""Share of the steps in which the learning rates rise."""

SAVED = 25
"""Steps between two states on disk."""

VIEWED = (1 << 24) - 1
"""Number of the step, never reached, whose views the loss is measured on before and after."""


@dataclass(frozen=True)
class Distillation:
    """How the network is distilled.

    iterations: steps, of ``batch_size`` images each. lr_weights: learning rate (Adam) in units of each weight's
    quantization step; 0: they stay. lr_scales: of activations' scales, relative to the scale. lr_vectors: of biases and
    LayerNorms, relative to the vector's root mean square. All rise for :data:`WARM_UP` of the steps and fall to zero
    along a cosine. features: λ. plain, strange: shares of images as they are and of out-of-distribution views; the rest
    are crops (:func:`.views.draw`).
    """

    iterations: int = 60
    batch_size: int = 16
    lr_weights: float = 0.0
    lr_scales: float = 0.004
    lr_vectors: float = 0.003
    features: float = 1.0
    plain: float = 0.1
    strange: float = 0.25

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.batch_size < 1:
            raise QuantlensError("distillation needs iterations >= 0 and a batch size >= 1")
        if self.plain < 0 or self.strange < 0 or self.plain + self.strange > 1 or self.features < 0:
            raise QuantlensError(
                "distillation: plain and strange are shares of 0 or more, together at most 1; features is 0 or more"
            )


@dataclass(frozen=True)
class DistillationReport:
    """before, after: the loss on a view of every calibration image. accepted: whether anything was changed."""

    before: float
    after: float
    accepted: bool
    iterations: int
    seconds: float


def distil(
    graph: Graph,
    plan: Plan,
    calibration: Calibration,
    settings: Distillation | None = None,
    *,
    reference: Graph,
    starts: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Path | str | None = None,
    memory: int = MEMORY,
) -> DistillationReport:
    """Train ``graph`` under ``plan`` towards ``reference``; changes tensors of the graph and quantizers of the plan.

    calibration: images, on the graph's device. reference: the float graph, of the same structure (or its logits alone
    are followed). starts: float weights by name from which the quantized ones were rounded; a trained weight starts at
    its code, as far towards its float value as rounds to that code. checkpoint: a folder where the state is stored
    every :data:`SAVED` steps; a later call with equal graph, plan, images, settings and seed goes on there, bit-equal.
    memory: bytes of cached images kept in memory.

    Random numbers come from CPU generators, seeded per step. A network whose loss on views of the calibration images
    did not fall stays as it was. Raises UnsupportedError for a plan with integer operators.
    """
    settings = settings or Distillation()
    if plan.operators:
        raise UnsupportedError("distillation works on quantizers; put integer operators in after it")
    started = time.perf_counter()
    with torch.no_grad(), held_memory(), ActivationStore(memory) as store:
        images = ImageCache(store, calibration.count)
        for index, chunk in enumerate(calibration):
            images.put(index * CHUNK, len(chunk), chunk)
        work = _Work(graph, plan, _Network(reference), images, settings, starts or {}, seed)
        saved = None
        if checkpoint is not None:
            key = fingerprint(graph, plan.quantizers, calibration, settings, seed, reference, starts)
            saved = Progressed(checkpoint, "distillation", key)
        before = work.measure()
        if settings.iterations == 0 or not math.isfinite(before) or before == 0:
            return DistillationReport(before, before, False, 0, 0.0)
        work.train(progress, saved)
        tensors, quantizers = work.freeze()
        kept = {name: graph.tensor(name) for name in tensors}, dict(plan.quantizers)
        _put(graph, plan, tensors, quantizers)
        after = _Work(graph, plan, work.teacher, images, settings, {}, seed).measure()
        if not after < before:
            _put(graph, plan, *kept)
    return DistillationReport(
        before, after, after < before, settings.iterations, round(time.perf_counter() - started, 3)
    )


def _put(graph: Graph, plan: Plan, tensors: Mapping[str, Tensor], quantizers: Mapping[str, Quantizer]) -> None:
    for name, value in tensors.items():
        graph.set_tensor(name, value)
    plan.quantizers.update(quantizers)
    graph.invalidate()


class _Network:
    """A graph as logits and features."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.nodes = [n for n in graph.fx.nodes if n.op == "call_function"]
        terms = classifier_terms(graph) or []
        self.features: list[fx.Node] = list(dict.fromkeys(node.args[0] for node, _ in terms))  # type: ignore[misc]

    def __call__(
        self, images: Tensor, hook: Any = None, constants: Mapping[fx.Node, Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        env: dict[fx.Node, Any] = {self.graph.input: images, **(constants or {})}
        out = self.graph.run(self.nodes, env, hook=hook, keep=[self.graph.output, *self.features])
        return out[self.graph.output], [out[n] for n in self.features]


class _Work:
    """Training of the network: learners, loss, steps."""

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        teacher: _Network,
        images: ImageCache,
        settings: Distillation,
        starts: Mapping[str, Tensor],
        seed: int,
    ):
        self.graph, self.plan, self.settings, self.images = graph, plan, settings, images
        self.teacher, self.student, self.device = teacher, _Network(graph), graph.device
        self.seed = seed
        self.fixed: dict[str, Tensor] = {}
        self.weights: dict[str, Latent] = {}
        self.scales: dict[str, LearnedScale] = {}
        self._learners(starts)
        self.vectors = {node: Vector(graph.tensor(str(node.target))) for node in trained_vectors(graph)}

    def _learners(self, starts: Mapping[str, Tensor]) -> None:
        """A learner for every scale that can learn, and for every weight that is trained: one that one layer reads."""
        edges, uses = self.graph.sites.edges, dict[str, int]()
        for edge in edges.values():
            if edge.is_weight:
                uses[str(edge.value.target)] = uses.get(str(edge.value.target), 0) + 1
        shared: dict[int, LearnedScale] = {}
        for key, quantizer in self.plan.quantizers.items():
            edge = edges[key]
            if not edge.is_weight:
                if learnable(quantizer):
                    self.scales[key] = shared.setdefault(id(quantizer), LearnedScale(quantizer))
                continue
            name = str(edge.value.target)
            weight = self.graph.tensor(name)
            able = isinstance(quantizer, Uniform) and uses[name] == 1 and bool(torch.isfinite(weight).all())
            if able and self.settings.lr_weights > 0:
                self.weights[key] = Latent(quantizer, near_code(quantizer, weight, starts.get(name)))
            else:
                self.fixed[key] = quantizer(weight)

    # -- one forward pass
    def run(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The student as trained so far."""
        weights = {**self.fixed, **{key: learner() for key, learner in self.weights.items()}}

        def hook(key: str, value: Tensor) -> Tensor:
            if key in weights:
                return weights[key]
            if key in self.scales:
                return self.scales[key](value)
            quantizer = self.plan.quantizers.get(key)
            return value if quantizer is None else fake_quantize(quantizer, value)

        return self.student(images, hook, {node: vector() for node, vector in self.vectors.items()})

    def loss(self, images: Tensor) -> Tensor:
        """L on images as given."""
        with torch.no_grad():
            logits, features = self.teacher(images)
        got, ours = self.run(images)
        total = divergence(got, logits, None)  # type: ignore[arg-type]
        for mine, theirs in zip(ours, features, strict=False):
            norm = theirs.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
            total = total + self.settings.features * ((mine - theirs).square().sum(-1) / norm).mean()
        return total

    def measure(self) -> float:
        """L on one view of every calibration image, the same ones in every call and none that is trained on (but for
        images as they are). On the images themselves a network that has learned them by heart would look best."""
        total, count = 0.0, self.images.count
        generator = torch.Generator().manual_seed((self.seed << 24) + VIEWED)
        for first in range(0, count, CHUNK):
            last = min(first + CHUNK, count)
            views = self._views(self.images.slice(first, last, self.device), generator)
            total += float(self.loss(views)) * len(views) / count
        return total

    def _views(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return draw(images, self.settings.plain, self.settings.strange, generator)

    # -- training
    def train(self, progress: Progress | None, saved: Progressed | None) -> None:
        """All steps, or those behind the ones that are ``saved``."""
        settings = self.settings
        rates = [
            (settings.lr_weights, [m.step for m in self.weights.values()]),
            (settings.lr_scales, list({id(m): m.ratio for m in self.scales.values()}.values())),
            (settings.lr_vectors, [v.step for v in self.vectors.values()]),
        ]
        groups: list[dict[str, Any]] = [{"params": p, "lr": rate, "start": rate} for rate, p in rates if p]
        optimiser = torch.optim.Adam(groups)
        for step in range(_resumed(optimiser, saved), settings.iterations):
            share = (step + 0.5) / settings.iterations
            factor = min(1.0, share / WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))
            for group in optimiser.param_groups:
                group["lr"] = group["start"] * factor
            generator = torch.Generator().manual_seed((self.seed << 24) + step)
            images = self._views(self.images.pick(self._batch(step), self.device), generator)
            with torch.enable_grad(), torch.inference_mode(False):
                loss = self.loss(images)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
            optimiser.step()
            if saved is not None and (step + 1) % SAVED == 0:
                saved.write(*_state(optimiser, step + 1))
            if progress is not None:
                progress(step + 1, settings.iterations)

    def _batch(self, step: int) -> Tensor:
        """Numbers of a step's images: a shuffled pass over all of them, again and again."""
        size, count = min(self.settings.batch_size, self.images.count), self.images.count
        epoch, place = divmod(step, count // size)
        order = torch.randperm(count, generator=torch.Generator().manual_seed((self.seed << 24) + epoch))
        return order[place * size : (place + 1) * size]

    def freeze(self) -> tuple[dict[str, Tensor], dict[str, Quantizer]]:
        """What training made: tensors by name, quantizers by edge key."""
        edges = self.graph.sites.edges
        tensors = {str(edges[key].value.target): learner.harden() for key, learner in self.weights.items()}
        tensors |= {str(node.target): vector().detach() for node, vector in self.vectors.items()}
        frozen: dict[int, Quantizer] = {}
        for learner in self.scales.values():
            if id(learner) not in frozen:
                frozen[id(learner)] = learner.freeze()
        return tensors, {key: frozen[id(learner)] for key, learner in self.scales.items()}


def _state(optimiser: torch.optim.Optimizer, done: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All parameters and what Adam knows of them, behind ``done`` steps."""
    tensors = {}
    for number, parameter in enumerate(p for group in optimiser.param_groups for p in group["params"]):
        tensors[f"{number}"] = parameter
        tensors |= {f"{number}.{name}": value for name, value in optimiser.state[parameter].items()}
    return tensors, {"done": done}


def _resumed(optimiser: torch.optim.Optimizer, saved: Progressed | None) -> int:
    """Put the saved state back; how many steps it is behind (0 without one)."""
    found = None if saved is None else saved.read()
    if found is None:
        return 0
    tensors, record = found
    for number, parameter in enumerate(p for group in optimiser.param_groups for p in group["params"]):
        parameter.data.copy_(tensors[f"{number}"])
        prefix = f"{number}."
        known = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        optimiser.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in known.items()}
    return int(record["done"])


def near_code(quantizer: Uniform, weight: Tensor, start: Tensor | None) -> Tensor:
    """The float value that is nearest to ``start`` among those within :data:`INSIDE` steps of the quantized
    ``weight``; that weight itself without a start."""
    code = quantizer(weight)
    if start is None:
        return code
    step = quantizer.spread(quantizer.scale, weight.dim())
    return code + torch.clamp((start.reshape(weight.shape) - code) / step, -INSIDE, INSIDE) * step
