"""MLPs with GELU made into MLPs with ReLU, and refitted (APHQ-ViT, Wu et al., CVPR 2025, section 3.4).

The output of a ReLU has one sign and no small negative values, so that few bits go further. The two linear layers are
refitted to reproduce the output that they had with GELU, on their inputs in the float model, also where the hidden
values are clipped.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quantlens.calibration import Calibration, CalibrationPass, EdgeView
from quantlens.graph import Edge, Graph, Site, argument
from quantlens.reconstruction.closed_form import Moments, output_shift, ridge
from quantlens.reconstruction.trainer import Group, train
from quantlens.transforms.layers import alone

CLIPPED = 2
"""Weight of the error with clipped hidden values, against that without (the authors' code)."""

RIDGE = 1e-2
"""Damping of the second layer's least-squares start (:func:`~quantlens.reconstruction.closed_form.ridge`)."""


@dataclass(frozen=True)
class Mlp:
    """Two linear layers with a GELU between them and nothing else."""

    first: Site
    gelu: Site
    second: Site


@dataclass(frozen=True)
class Fit:
    """How MLPs are refitted.

    steps, batch: of Adam, and rows (tokens) per step. lr: in standard deviations of the weights, falling to 0 along a
    cosine. quantile: of the positive hidden values, where they are clipped.
    """

    steps: int
    batch: int = 1024
    lr: float = 0.02
    quantile: float = 0.98


def find_mlps(graph: Graph) -> list[Mlp]:
    """All MLPs of a graph whose hidden values and parameters nothing else reads."""
    linears = {site.node: site for site in graph.sites.of_kind("linear")}
    found = []
    for gelu in graph.sites.of_kind("gelu"):
        source, readers = gelu.node.args[0], list(gelu.node.users)
        if source in linears and len(source.users) == 1 and len(readers) == 1 and readers[0] in linears:
            found.append(Mlp(linears[source], gelu, linears[readers[0]]))
    return [mlp for mlp in found if alone(graph, mlp.first) and alone(graph, mlp.second)]


def replace_gelu(
    graph: Graph,
    calibration: Calibration,
    fit: Fit,
    weights: Mapping[str, Tensor],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[float, float]]:
    """Replace GELU by ReLU in all MLPs of ``graph`` and refit each on the float model's values.

    weights: by name of the second layer, how much an error of each element of its output counts, [1, …] like the
    output of one image; mean 1 (missing: all the same). Returns by name of the second layer the weighted squared error
    of its output, as a share of its weighted squared output: with the old weights after ReLU, and refitted.
    """
    mlps = find_mlps(graph)
    by_input = {mlp.first.edges["input"].key: mlp for mlp in mlps}
    generator = torch.Generator().manual_seed(seed)
    errors: dict[str, tuple[float, float]] = {}
    fitted: dict[str, Tensor] = {}

    def on_edge(edge: Edge, view: EdgeView) -> None:
        mlp = by_input[edge.key]
        work = _Refit(graph, mlp, torch.cat(list(view.tensors())), weights.get(mlp.second.name), fit)
        tensors, errors[mlp.second.name] = work.run(generator)
        fitted.update(tensors)

    edges = [mlp.first.edges["input"] for mlp in mlps]
    CalibrationPass(graph, calibration, sequential=False, seed=seed).run(edges, on_edge, progress)
    for name, tensor in fitted.items():
        graph.set_tensor(name, tensor)
    for mlp in mlps:
        node = mlp.gelu.node
        node.target, node.args, node.kwargs = torch.ops.aten.relu.default, node.args[:1], {}
    graph.invalidate()
    return errors


Weights = list[Any]
"""Weight and bias (None without) of the first layer, then of the second."""


class _Refit:
    """Refitting of one MLP on inputs [n, tokens …, C] (all calibration images)."""

    def __init__(self, graph: Graph, mlp: Mlp, inputs: Tensor, spread: Tensor | None, fit: Fit):
        self.fit, self.names = fit, (mlp.first.weight, mlp.first.bias, mlp.second.weight, mlp.second.bias)
        self.old: Weights = [None if n is None else graph.tensor(n) for n in self.names]
        self.inputs = inputs.reshape(-1, inputs.shape[-1])
        self.gelu = partial(functional.gelu, approximate=str(argument(mlp.gelu.node, "approximate")))
        hidden = self.gelu(functional.linear(self.inputs, *self.old[:2]))
        self.outputs = functional.linear(hidden, *self.old[2:])
        shape = (*inputs.shape[:-1], self.outputs.shape[-1])
        spread = torch.ones((), device=inputs.device) if spread is None else spread.to(inputs.device)
        self.spread = spread.expand(shape).reshape(self.outputs.shape)
        positive, self.bound = hidden[hidden > 0], math.inf
        if len(positive):
            self.bound = float(positive.kthvalue(max(1, math.ceil(fit.quantile * len(positive)))).values)

    def errors(self, weights: Weights, rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Weighted mean squared error of some rows' outputs, and the same with clipped hidden values."""
        hidden = functional.linear(self.inputs[rows], *weights[:2]).relu()
        plain, clipped = (
            (functional.linear(h, *weights[2:]) - self.outputs[rows]).square().mul(self.spread[rows]).mean()
            for h in (hidden, hidden.clamp_max(self.bound))
        )
        return plain, clipped

    def loss(self, weights: Weights, rows: Tensor | slice = slice(None)) -> Tensor:
        plain, clipped = self.errors(weights, rows)
        return plain + CLIPPED * clipped

    def run(self, generator: torch.Generator) -> tuple[dict[str, Tensor], tuple[float, float]]:
        """The new tensors by name, and the relative error before and after. The best of the weights as they were; with
        the best second layer for the old first one; and both trained from there."""
        start = self._least_squares()
        best = min((self.old, start, self._trained(start, generator)), key=lambda weights: float(self.loss(weights)))
        size = float((self.outputs.square() * self.spread).mean()) or 1.0
        made = {n: t for n, t in zip(self.names, best, strict=True) if n is not None}
        return made, (float(self.errors(self.old)[0]) / size, float(self.errors(best)[0]) / size)

    def _least_squares(self) -> Weights:
        """The second layer by ridge regression, hidden values after ReLU against those after GELU."""
        *first, weight, bias = self.old
        if bias is None:
            return self.old
        before = functional.linear(self.inputs, *first)
        plain, wanted = before.relu(), self.gelu(before)
        moments = Moments.of([(plain, wanted), *[(plain.clamp_max(self.bound), wanted)] * CLIPPED])
        fitted = ridge(weight, moments, RIDGE)
        return [*first, fitted, (bias - output_shift(weight, fitted, moments)).float()]

    def _trained(self, start: Weights, generator: torch.Generator) -> Weights:
        """Adam on both layers."""
        weights = [None if t is None else t.clone().requires_grad_(True) for t in start]
        pairs = [[t for t in pair if t is not None] for pair in (weights[:2], weights[2:])]
        count = len(self.inputs)

        def loss(_: float) -> Tensor:
            rows = torch.randint(count, (min(self.fit.batch, count),), generator=generator)
            return self.loss(weights, rows.to(self.inputs.device))

        train([Group(pair, self.fit.lr * float(pair[0].detach().std())) for pair in pairs], self.fit.steps, loss)
        return [None if t is None else t.detach() for t in weights]
