"""How much the model suffers when one group is quantized at one width: four ways to say it.

All share the quantizers (min-max ranges of one pass over the float model: weights per output channel, activations per
tensor; every width from the same ranges) and the pass: each chunk of images goes through the float model once, and
where a group begins, the values that wait there are the cached input from which that group is run again at every
width. No candidate costs a forward of the whole model.

``nuclear-norm`` (Liu et al., NeurIPS 2021, section 3.3, eq. 17):

    Ω = Σ_attention ‖A‖_* · ‖Â − A‖²_F + Σ_MLP ‖O‖_* · ‖Ô − O‖²_F

Where the paper differs from this file, or is silent:

1. ``formula=paper`` is eq. 17 to the letter. The default, ``formula=balanced``, is

       Ω = Σ_attention ‖A‖_*/‖A‖_F · ‖Ô − O‖²_F + Σ_MLP ‖O‖_*/‖O‖_F · ‖Ô − O‖²_F

   with O the output of the module's last linear layer, for the attention that of its projection. An attention map's
   entries are below 1 and an MLP's outputs are not: on DeiT-Tiny the second sum of eq. 17 is five hundred times the
   first, and its minimum gives every attention the narrowest width there is. Its error is also blind to v and to the
   projection, which are half of the attention's weights. Here both errors are measured where the module adds to the
   residual stream, in one unit, and the nuclear norm keeps the part that the paper gives it: it says how diverse the
   module's features are, whatever their size (‖M‖_*/‖M‖_F lies between 1 and the root of the rank). DeiT-Tiny by
   min-max at the size of W6A6, KL from the float model on 125 images: uniform 0.23, balanced 0.17, paper 3.9.
2. A is the attention map after the softmax, as the product with v reads it, so that Â has its own quantizer's error
   too. An image's map is that of all heads (and windows) together, a block-diagonal matrix: nuclear norms and squares
   add up over heads. O is one matrix [tokens, channels] per image, before the residual sum.
3. Norms and errors are means over images, taken apart as in the formula: errors over all calibration images, norms,
   which hardly vary from image to image and cost most, over :data:`NORM_IMAGES` of every 32.
4. Only the group's own quantizers act; its input is the float model's.

``kl``: mean KL divergence (nats) of the float model's softmax from that of the model with one group quantized; from
the group on the rest of the model runs, in float. The honest yardstick, and the slow one.

``random``: the control, ρ·4⁻ᵇ with log₁₀ ρ uniform in [−2, 2] per group: a loss that falls with the width as rounding
noise does, and knows nothing of the model.

``hessian``: :mod:`quantlens.allocation.hessian`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.allocation.groups import ATTENTION, COMPUTES, Group
from quantlens.allocation.spectra import nuclear_norm
from quantlens.calibration import CHUNK, Calibration, CalibrationPass, EdgeView
from quantlens.calibration.ranges import affine
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer
from quantlens.graph import Edge, Graph
from quantlens.methods.base import Progress, matmul_operand_edges
from quantlens.metrics.divergence import kl_of_logits
from quantlens.sensitivity.partial import Ahead, Hook, Visit, part_between, visit_starts

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
        progress: Progress | None = None,
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

        calibration_pass = CalibrationPass(graph, calibration, sequential=False, seed=seed)
        calibration_pass.run([edge for part in self.edges for edge in part], note, progress)

    def quantizer(self, edge: Edge, bits: int) -> Quantizer:
        """The quantizer of an edge at a width."""
        axis, granularity = (0, "channel") if edge.is_weight else (None, "tensor")
        return affine(*self._ranges[edge.key], bits, granularity=granularity, axis=axis)

    def weight(self, edge: Edge, bits: int) -> Tensor:
        """A group's weight at a width; the same tensor every time."""
        found = self._weights.get((edge.key, bits))
        if found is None:
            found = self.quantizer(edge, bits)(self.graph.tensor(str(edge.value.target)))
            self._weights[edge.key, bits] = found
        return found

    def hook(self, group: int, bits: int) -> Hook:
        """For :meth:`Graph.run`: quantizes what crosses the edges of one group."""
        weights = {edge.key: self.weight(edge, bits) for edge in self.edges[group] if edge.is_weight}
        others = {edge.key: self.quantizer(edge, bits) for edge in self.edges[group] if not edge.is_weight}

        def apply(key: str, value: Tensor) -> Tensor:
            if key in weights:
                return weights[key]
            return others[key](value) if key in others else value

        return apply

    def nodes(self, group: int) -> list[fx.Node]:
        """The nodes whose edges are quantized, in graph order."""
        return list(dict.fromkeys(edge.node for edge in self.edges[group]))


def visit_groups(
    candidates: Candidates, calibration: Calibration, visit: Visit, progress: Progress | None = None
) -> None:
    """As :func:`~quantlens.sensitivity.partial.visit_starts`, for the groups of ``candidates``."""
    nodes = [candidates.nodes(group) for group in range(len(candidates.groups))]
    visit_starts(candidates.graph, nodes, calibration, visit, progress)


# -- nuclear norm ---------------------------------------------------------------------------------------------------
BALANCED, PAPER = "balanced", "paper"


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

    formula: "balanced" or "paper" (eq. 17); see the head of this file. Raises QuantlensError for another.
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

    visit_groups(candidates, calibration, visit, progress)
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
    """Mean KL(float ‖ one group quantized) of the softmax over the classes, nats per image, float64 [G, W]."""
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

    visit_groups(candidates, calibration, visit, progress)
    return found / len(calibration), {}


# -- random ---------------------------------------------------------------------------------------------------------
def random_sensitivity(
    groups: Sequence[Group], widths: Sequence[int], *, seed: int = 0
) -> tuple[Tensor, dict[str, Any]]:
    """ρ·4⁻ᵇ, log₁₀ ρ uniform in [−2, 2], float64 [G, W]."""
    generator = torch.Generator().manual_seed(seed)
    exponents = 4 * torch.rand(len(groups), generator=generator, dtype=torch.float64) - 2
    falling = torch.tensor([4.0**-bits for bits in widths], dtype=torch.float64)
    return (10**exponents)[:, None] * falling, {}
