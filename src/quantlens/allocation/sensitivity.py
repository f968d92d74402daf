"""How much the output suffers when one group is quantized at one width: ``nuclear-norm``, ``kl`` and ``random``
(``hessian`` is :mod:`quantlens.allocation.hessian`).

All share the quantizers (min-max ranges of one pass over the float model: weights per output channel, activations per
tensor; the same ranges at every width) and the pass: each chunk of images goes through the float model once, and where
a group begins, the values that wait there are kept as the input from which that group is run again at every width.
Only the group's own quantizers act. :data:`DEPARTURES` lists where ``nuclear-norm`` differs from its paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.allocation.groups import ATTENTION, COMPUTES, Group
from quantlens.calibration import CHUNK, Calibration, CalibrationPass, EdgeView
from quantlens.calibration.ranges import affine
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer
from quantlens.graph import Edge, Graph
from quantlens.methods.base import Progress, matmul_operand_edges
from quantlens.metrics.divergence import kl_of_logits
from quantlens.sensitivity.alone import Ahead, Hook, Visit, part_between, visit_starts

DEPARTURES = (
    "formula=balanced, the default, is ours: both errors where the module adds to the residual stream, norms relative "
    "to the Frobenius norm; formula=paper is eq. 17",
    "the attention map is the one that the product with v reads, so its own quantizer's error counts",
    "the maps of all heads and windows of an image are one block-diagonal matrix: norms and squares add up over them",
    "errors are means over all calibration images, norms over 8 of every 32, as these cost most and vary least",
    "a group's input is the float model's: no other group is quantized with it",
)
"""Where ``nuclear-norm`` differs from Liu et al., or the paper is silent."""

NORM_IMAGES = 8
"""Images of each chunk of 32 that nuclear norms are measured on."""


def _extremes(view: EdgeView, edge: Edge) -> tuple[Tensor, Tensor]:
    """Smallest and largest value: of each output channel for a weight [G], of the whole tensor else [1].

    Raises QuantlensError naming the edge where values are not finite.
    """
    pieces = [p.flatten(1) if edge.is_weight else p.reshape(1, -1) for p in view.tensors()]
    low = torch.stack([p.amin(1) for p in pieces]).amin(0)
    high = torch.stack([p.amax(1) for p in pieces]).amax(0)
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise QuantlensError(f"{edge.key}: values are not finite; check the weights and the calibration images")
    return low, high


class Candidates:
    """The quantizers of every group at every width.

    ``values`` of one pass over ``calibration`` set the ranges; :meth:`hook` applies a group's quantizers at a width.
    """

    def __init__(
        self,
        graph: Graph,
        calibration: Calibration,
        groups: Sequence[Group],
        widths: Sequence[int],
        *,
        seed: int = 0,
    ):
        self.graph, self.groups, self.widths = graph, list(groups), tuple(widths)
        owner = {site: i for i, group in enumerate(groups) for site in group.sites}
        self.edges: list[list[Edge]] = [[] for _ in groups]
        for edge in matmul_operand_edges(graph):
            if edge.site in owner:
                self.edges[owner[edge.site]].append(edge)
        self._ranges: dict[str, tuple[Tensor, Tensor]] = {}
        self._weights: dict[tuple[str, int], Tensor] = {}

        def note(edge: Edge, view: EdgeView) -> None:
            self._ranges[edge.key] = _extremes(view, edge)

        edges = [edge for part in self.edges for edge in part]
        CalibrationPass(graph, calibration, sequential=False, seed=seed).run(edges, note)

    def quantizer(self, edge: Edge, bits: int) -> Quantizer:
        """The quantizer of an edge at a width."""
        axis, granularity = (0, "channel") if edge.is_weight else (None, "tensor")
        return affine(*self._ranges[edge.key], bits, granularity=granularity, axis=axis)

    def weight(self, edge: Edge, bits: int) -> Tensor:
        """A group's weight at a width; the same tensor every time."""
        if (edge.key, bits) not in self._weights:
            self._weights[edge.key, bits] = self.quantizer(edge, bits)(self.graph.tensor(str(edge.value.target)))
        return self._weights[edge.key, bits]

    def hook(self, group: int, bits: int) -> Hook:
        """For :meth:`Graph.run`: quantizes what crosses the edges of one group."""
        weights = {edge.key: self.weight(edge, bits) for edge in self.edges[group] if edge.is_weight}
        others = {edge.key: self.quantizer(edge, bits) for edge in self.edges[group] if not edge.is_weight}

        def apply(key: str, value: Tensor) -> Tensor:
            if key in weights:
                return weights[key]
            return others[key](value) if key in others else value

        return apply

    def visit(self, calibration: Calibration, visit: Visit, progress: Progress | None) -> None:
        """As :func:`~quantlens.sensitivity.alone.visit_starts`, for the groups."""
        visit_starts(self.graph, [[edge.node for edge in part] for part in self.edges], calibration, visit, progress)


# -- nuclear norm ---------------------------------------------------------------------------------------------------
BALANCED, PAPER = "balanced", "paper"


def nuclear_norm(matrices: Tensor) -> Tensor:
    """Sum of the singular values (Liu et al. 2021, eq. 16) of matrices [..., n, m] -> [...], float64.

    The singular values are the roots of the eigenvalues of the smaller Gram matrix, in double precision: they are
    exact to 1e-8 of the largest one, and several times faster than a singular value decomposition.
    """
    wide = (matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT).double()
    return torch.linalg.eigvalsh(wide @ wide.mT).clamp_min_(0).sqrt_().sum(-1)


def nuclear_norm_sensitivity(
    candidates: Candidates,
    calibration: Calibration,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    formula: str = BALANCED,
) -> tuple[Tensor, dict[str, Any]]:
    """Ω of every group and width, float64 [G, W]; and what it is made of: nuclear norms [G], norms relative to the
    Frobenius norm [G], squared errors [G, W].

    Liu et al., NeurIPS 2021, section 3.3. A: an attention map after the softmax (block-diagonal over heads), O: the
    output of the last linear layer; norms and errors are means over images. formula, else QuantlensError:
    "paper" (eq. 17): Ω = Σ_attention ‖A‖_* · ‖Â − A‖²_F + Σ_MLP ‖O‖_* · ‖Ô − O‖²_F
    "balanced" (ours): Ω = Σ_attention ‖A‖_*/‖A‖_F · ‖Ô − O‖²_F + Σ_MLP ‖O‖_*/‖O‖_F · ‖Ô − O‖²_F, both errors in the
    unit of the residual stream, and norms that say how diverse features are, whatever their size.
    """
    if formula not in (BALANCED, PAPER):
        raise QuantlensError(f"nuclear-norm: formula={formula!r}; choose {BALANCED} or {PAPER}")
    graph, widths = candidates.graph, candidates.widths
    maps = [_maps(graph, group) for group in candidates.groups]
    outputs = [_output(graph, group) for group in candidates.groups]
    share = min(1.0, NORM_IMAGES / min(CHUNK, len(calibration)))
    norm = torch.zeros(len(outputs), dtype=torch.float64)
    power = torch.zeros_like(norm)
    error = torch.zeros(len(outputs), len(widths), dtype=torch.float64)

    def visit(group: int, env: dict, ahead: Ahead) -> None:
        featured = maps[group] or [outputs[group]]
        compared = featured if formula == PAPER else [outputs[group]]
        expected = ahead(dict.fromkeys([*featured, *compared]))
        for node in featured:
            value = expected[node]
            some = value[: max(1, round(share * len(value)))]
            whole = len(value) / len(some)
            norm[group] += whole * nuclear_norm(some if maps[group] else some.flatten(1, -2)).sum().cpu()
            power[group] += whole * some.square().sum(dtype=torch.float64).cpu()
        part = part_between(graph, env, compared)
        for column, bits in enumerate(widths):
            got = graph.run(part, dict(env), hook=candidates.hook(group, bits), keep=compared)
            for node in compared:
                error[group, column] += (got[node] - expected[node]).square_().sum(dtype=torch.float64).cpu()

    candidates.visit(calibration, visit, progress)
    count = len(calibration)
    norm, power, error = norm / count, power / count, error / count
    diversity = norm / power.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    info = {"nuclear_norms": norm.tolist(), "diversities": diversity.tolist(), "squared_errors": error.tolist()}
    return (norm if formula == PAPER else diversity)[:, None] * error, info


def _maps(graph: Graph, group: Group) -> list[fx.Node]:
    """The attention maps of an attention, nothing of an MLP."""
    sites = [graph.sites[name] for name in group.sites] if group.kind == ATTENTION else []
    return [site.node for site in sites if site.kind == "probs"]


def _output(graph: Graph, group: Group) -> fx.Node:
    """The result of a group's last layer."""
    return [graph.sites[name].node for name in group.sites if graph.sites[name].kind in COMPUTES][-1]


# -- kl -------------------------------------------------------------------------------------------------------------
def kl_sensitivity(
    candidates: Candidates, calibration: Calibration, *, seed: int = 0, progress: Progress | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """Mean KL(float ‖ one group quantized) of the softmax over the classes, nats per image, float64 [G, W]. From the
    group on the rest of the model runs in float: exact, and slow."""
    graph, widths = candidates.graph, candidates.widths
    found = torch.zeros(len(candidates.groups), len(widths), dtype=torch.float64)
    reference: dict[str, Tensor] = {}

    def visit(group: int, env: dict, ahead: Ahead) -> None:
        part = part_between(graph, env, [graph.output])
        images = env[graph.input]
        if reference.get("images") is not images:
            reference["images"] = images
            reference["logits"] = graph.run(part, dict(env), keep=[graph.output])[graph.output]
        for column, bits in enumerate(widths):
            logits = graph.run(part, dict(env), hook=candidates.hook(group, bits), keep=[graph.output])[graph.output]
            found[group, column] += kl_of_logits(reference["logits"].double(), logits.double()).sum().cpu()

    candidates.visit(calibration, visit, progress)
    return found / len(calibration), {}


# -- random ---------------------------------------------------------------------------------------------------------
def random_sensitivity(
    groups: Sequence[Group], widths: Sequence[int], *, seed: int = 0
) -> tuple[Tensor, dict[str, Any]]:
    """The control: ρ·4⁻ᵇ, log₁₀ ρ uniform in [−2, 2] per group, float64 [G, W]. It falls with the width as rounding
    noise does, and knows nothing of the model."""
    generator = torch.Generator().manual_seed(seed)
    exponents = 4 * torch.rand(len(groups), generator=generator, dtype=torch.float64) - 2
    falling = torch.tensor([4.0**-bits for bits in widths], dtype=torch.float64)
    return (10**exponents)[:, None] * falling, {}
