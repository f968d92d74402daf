"""How much the model's output suffers from an error at the output of a unit: the metrics of block reconstruction.

The damage is L = KL(softmax(f) ‖ softmax(f̂)) at temperature T between the float model's logits f and those that the
float rest of the network makes of a changed output ŷ of one unit (of sigmoids and features: :func:`.damage`). At ŷ = y
its gradient is zero and its Hessian is the Fisher matrix F of that output, so that ∂L/∂ŷ ≈ F·(ŷ − y). Of a detector L
is summed over queries, T is 1, and the error of the boxes (:func:`.box_error`) is added.

* :func:`fisher_metrics`: gradients at the quantized unit's output, with the errors that caused them, give a matrix of
  low rank and a diagonal (FIMA-Q, Wu et al., CVPR 2025).
* :func:`perturbation_metrics`: the difference of two gradients, at y + ε and y − ε, gives a diagonal (APHQ-ViT, Wu et
  al., CVPR 2025).
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from quantlens.calibration import Calibration, images_together
from quantlens.formats import Quantizer
from quantlens.graph import Graph
from quantlens.metrics.divergence import OutputKind, box_error, damage, objects_of
from quantlens.reconstruction.settings import Metric
from quantlens.reconstruction.units import Unit, find_units, frozen_hook, run_unit

TEMPERATURE = 20.0
"""Of both softmaxes, as in the code of FIMA-Q and APHQ-ViT."""

DAMPING = 1e-3
"""Added to the diagonal of the low-rank part's inner matrix, as a share of its mean: rows of magnitudes, averaged over
images, are nearly parallel."""

STEP = 0.01
"""Size of the perturbation in standard deviations of the output."""


def fisher_metrics(
    graph: Graph,
    quantizers: Mapping[str, Quantizer],
    calibration: Calibration,
    *,
    rank: int = 5,
    damping: float = DAMPING,
    temperature: float = TEMPERATURE,
    outputs: OutputKind = "softmax",
) -> dict[str, Metric]:
    """Diagonal plus low-rank metrics by unit, for units with one result that is not the logits.

    Every unit in turn runs quantized on the float model's values, everything else in float. Of ``rank`` groups of
    images each gives one row of G, the mean magnitude of the gradient at the unit's output, and one row of D, the mean
    magnitude of its error. With B = D·Dᵀ + λI, the low-rank part is Gᵀ·B⁻¹·G, the diagonal the mean of G's rows. Each
    part is divided by its mean value on D's rows, so that both weigh the same. A unit without any error gets none.
    outputs: what the model gives.
    """
    rows: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    probe = _Probe(graph, temperature, outputs)
    for batch in probe.batches(calibration, least=rank):
        for index, unit in enumerate(probe.measured):
            hook = frozen_hook(graph, unit, quantizers)
            env = {n: batch[n] for n in (*unit.sources, *unit.choices)}
            changed = run_unit(graph, unit, env, len(batch[graph.input]), hook)[0]
            gradient, error = probe.gradient(batch, index, changed), changed - batch[unit.results[0]]
            for kept, new in zip(rows.setdefault(unit.name, ([], [])), (gradient, error), strict=True):
                kept.append(new.abs().mean(0, keepdim=True))
    return {name: m for name, (g, d) in rows.items() if (m := low_rank(_grouped(g, rank), _grouped(d, rank), damping))}


def low_rank(gradients: Tensor, errors: Tensor, damping: float = DAMPING) -> Metric | None:
    """The metric of rows G and D, both [k, …], ≥ 0; None if one of them is all zero. See :func:`fisher_metrics`."""
    g, d = gradients.flatten(1).double(), errors.flatten(1).double()
    if not bool(g.any()) or not bool(d.any()):
        return None
    inner = d @ d.T
    inner.diagonal().add_(damping * inner.diagonal().mean())
    factors = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), g, upper=False)
    diagonal = g.mean(0)
    factors /= (factors @ d.T).square().sum(0).mean().sqrt()
    diagonal /= (d.square() @ diagonal).mean()
    return Metric(diagonal.float().reshape(1, *gradients.shape[1:]), factors.float())


def perturbation_metrics(
    graph: Graph,
    calibration: Calibration,
    *,
    step: float = STEP,
    temperature: float = TEMPERATURE,
    seed: int = 0,
    outputs: OutputKind = "softmax",
) -> dict[str, Metric]:
    """Diagonal metrics by unit, for units with one result that is not the logits.

    With δ = ``step`` standard deviations of the output times random signs v, the diagonal is the mean over all images
    of |g(y + δv) − g(y − δv)|/2δ, that is of |F·v|, divided by its own mean.

    The signs are random because the same number added to all channels of a token changes nothing: every later
    LayerNorm takes the mean away, and F·(1, …, 1) = 0. outputs: what the model gives.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    probe = _Probe(graph, temperature, outputs)
    for batch in probe.batches(calibration):
        for index, unit in enumerate(probe.measured):
            value = batch[unit.results[0]]
            signs = (torch.rand(value.shape, generator=generator) < 0.5).to(value.device)
            shift = torch.where(signs, step, -step) * value.std()
            gradients = [probe.gradient(batch, index, value + s) for s in (shift, -shift)]
            total = (gradients[0] - gradients[1]).abs().mean(0, keepdim=True) * len(batch[graph.input])
            sums[unit.name] = sums[unit.name] + total if unit.name in sums else total
    means = {name: total / total.mean() for name, total in sums.items() if bool(total.any())}
    return {name: Metric(mean / mean.numel()) for name, mean in means.items()}


def _grouped(rows: list[Tensor], count: int) -> Tensor:
    """Rows of equal shape, averaged over ``count`` groups: [≤ count, …]."""
    return torch.stack([part.mean(0) for part in torch.cat(rows).chunk(count)])


Values = dict[fx.Node, Tensor]
"""The float model's values at the ends of all units, of some images."""


class _Probe:
    """Gradients of the damage at the output of any unit."""

    def __init__(self, graph: Graph, temperature: float, outputs: OutputKind = "softmax"):
        self.graph, self.units, self.boxes, self.outputs = graph, find_units(graph), graph.boxes, outputs
        self.temperature = temperature if self.boxes is None else 1.0
        ends = (graph.output, self.boxes)
        alone = (u for u in self.units if len(u.results) - len(u.choices) == 1)
        self.measured = [u for u in alone if u.results[0] not in ends]

    def batches(self, calibration: Calibration, least: int = 1) -> Iterator[Values]:
        """All images, as many together as memory allows, in at least ``least`` batches if there are as many images."""
        most = min(images_together(self.graph, 1), max(1, calibration.count // least))
        for chunk in calibration:
            for images in chunk.chunk(math.ceil(len(chunk) / most)):
                yield self._run(self.units, {self.graph.input: images})

    def gradient(self, batch: Values, index: int, changed: Tensor) -> Tensor:
        """∂L/∂ŷ for ``changed`` = ŷ, the result of measured unit number ``index``, L summed over the images."""
        unit = self.measured[index]
        with torch.enable_grad():
            leaf = changed.detach().requires_grad_(True)
            after = self._run(self.units[self.units.index(unit) + 1 :], {**batch, unit.results[0]: leaf})
            return torch.autograd.grad(self._damage(batch, after), leaf)[0]

    def _damage(self, batch: Values, after: Values) -> Tensor:
        expected, got = (x[self.graph.output] / self.temperature for x in (batch, after))
        total = damage(expected, got, self.outputs, "sum")
        if self.boxes is not None:
            found, objects = after[self.boxes], objects_of(expected, self.outputs == "sigmoid")
            total = total + box_error(found, batch[self.boxes], objects) * len(found)
        return total

    def _run(self, units: Sequence[Unit], values: Values) -> Values:
        """``values`` with the results of units added; choices that are there already are kept."""
        for unit in units:
            env = {node: values[node] for node in (*unit.sources, *unit.choices) if node in values}
            images = len(values[self.graph.input])
            values.update(zip(unit.results, run_unit(self.graph, unit, env, images), strict=True))
        return values
