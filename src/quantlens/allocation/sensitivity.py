"""How much the output suffers when one group is quantized at one width: ``nuclear-norm``, ``kl``, ``random``, hessian.

All share the quantizers (min-max ranges of one pass over the float model: weights per output channel, activations per
tensor; the same ranges at every width) and the pass: each chunk of images goes through the float model once, and where
a group begins, the values that wait there are kept as the input from which that group is run again at every width.
Only the group's own quantizers act. :data:`DEPARTURES` lists where ``nuclear-norm`` differs from its paper.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.allocation.groups import ATTENTION, COMPUTES, Group
from quantlens.arguments import checked
from quantlens.calibration import CHUNK, Calibration, CalibrationPass, EdgeView, affine
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer
from quantlens.graph import Edge, Graph
from quantlens.methods.base import Progress, matmul_operand_edges, readers
from quantlens.metrics.divergence import kl_of_logits
from quantlens.sensitivity.alone import Ahead, Hook, part_between, visit_starts

DEPARTURES = (
    "formula=balanced, the default, is ours: both errors where the module adds to the residual stream, norms relative "
    "to the Frobenius norm; formula=paper is eq. 17",
    "a detector's errors (ours): of the residual sum after the module, relative to it",
    "the attention map is the one that the product with v reads, so its own quantizer's error counts",
    "the maps of all heads and windows of an image are one block-diagonal matrix: norms and squares add up over them",
    "errors are means over all calibration images, norms over 8 of every 32, as these cost most and vary least",
    "a group's input is the float model's: no other group is quantized with it",
)
"""Where ``nuclear-norm`` differs from Liu et al., or the paper is silent."""

NORM_IMAGES = 8
"""Images of each chunk of 32 that nuclear norms are measured on."""


def _extremes(edge: Edge, view: EdgeView) -> tuple[Tensor, Tensor]:
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
        self.nodes = [[edge.node for edge in part] for part in self.edges]
        self._weights: dict[tuple[str, int], Tensor] = {}
        edges = [edge for part in self.edges for edge in part]
        images = CalibrationPass(graph, calibration, sequential=False, seed=seed)
        self._ranges: dict[Edge, tuple[Tensor, Tensor]] = images.run(edges, _extremes)

    def quantizer(self, edge: Edge, bits: int) -> Quantizer:
        """The quantizer of an edge at a width."""
        axis, granularity = (0, "channel") if edge.is_weight else (None, "tensor")
        return affine(*self._ranges[edge], bits, granularity=granularity, axis=axis)

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


# -- nuclear norm ---------------------------------------------------------------------------------------------------
BALANCED, PAPER = "balanced", "paper"


def nuclear_norm(matrices: Tensor) -> Tensor:
    """Sum of the singular values (Liu et al. 2021, eq. 16) of matrices [..., n, m] -> [...], float64.

    The singular values are the roots of the eigenvalues of the smaller Gram matrix, in double precision: they are
    exact to 1e-8 of the largest one, and several times faster than a singular value decomposition.
    """
    wide = (matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT).double()
    return torch.linalg.eigvalsh(wide @ wide.mT).clamp_min_(0).sqrt_().sum(-1)


@checked
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
    unit of the residual stream, norms whatever the size. A detector has two streams, image and queries: there errors
    are of the residual sum after the module, and relative to it.
    """
    if formula not in (BALANCED, PAPER):
        raise QuantlensError(f"nuclear-norm: formula={formula!r}; choose {BALANCED} or {PAPER}")
    graph, widths = candidates.graph, candidates.widths
    members = [(group.kind, [graph.sites[name] for name in group.sites]) for group in candidates.groups]
    maps = [[site.node for site in sites if site.kind == "probs" and kind == ATTENTION] for kind, sites in members]
    outputs = [[site.node for site in sites if site.kind in COMPUTES][-1] for _, sites in members]
    relative = formula == BALANCED and graph.boxes is not None
    ends = [_sum_after(graph, node) for node in outputs] if relative else outputs
    share = min(1.0, NORM_IMAGES / min(CHUNK, len(calibration)))
    norm = torch.zeros(len(outputs), dtype=torch.float64)
    power, energy = torch.zeros_like(norm), torch.zeros_like(norm)
    error = torch.zeros(len(outputs), len(widths), dtype=torch.float64)

    def visit(group: int, env: dict, ahead: Ahead) -> None:
        featured = maps[group] or [outputs[group]]
        compared = featured if formula == PAPER else [ends[group]]
        expected = ahead(dict.fromkeys([*featured, *compared]))
        for node in featured:
            value = expected[node]
            some = value[: max(1, round(share * len(value)))]
            whole = len(value) / len(some)
            norm[group] += whole * nuclear_norm(some if maps[group] else some.flatten(1, -2)).sum().cpu()
            power[group] += whole * some.square().sum(dtype=torch.float64).cpu()
        energy[group] += sum(expected[node].square().sum(dtype=torch.float64).cpu() for node in compared)
        part = part_between(graph, env, compared)
        for column, bits in enumerate(widths):
            got = graph.run(part, dict(env), hook=candidates.hook(group, bits), keep=compared)
            for node in compared:
                error[group, column] += (got[node] - expected[node]).square_().sum(dtype=torch.float64).cpu()

    visit_starts(graph, candidates.nodes, calibration, visit, progress)
    count, tiny = len(calibration), torch.finfo(torch.float32).tiny
    norm, power = norm / count, power / count
    error /= energy.clamp_min(tiny)[:, None] if relative else count
    diversity = norm / power.clamp_min(tiny).sqrt()
    info = {"nuclear_norms": norm.tolist(), "diversities": diversity.tolist(), "squared_errors": error.tolist()}
    return (norm if formula == PAPER else diversity)[:, None] * error, info


def _sum_after(graph: Graph, output: fx.Node) -> fx.Node:
    """The residual sum that a module's output is added to; the output itself where there is none."""
    sums = {site.node for site in graph.sites.of_kind("add")}
    return next((node for node, _ in readers(graph, output) if node in sums), output)


# -- kl -------------------------------------------------------------------------------------------------------------
@checked
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

    visit_starts(graph, candidates.nodes, calibration, visit, progress)
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


# -- hessian -------------------------------------------------------------------------------------------------------
# The sensitivity of HAWQ-V2 (Dong et al., NeurIPS 2020; arXiv 1911.03852): the sum, over a group's layers l and their
# inputs a, of the mean Hessian eigenvalue times the squared error of quantization at b bits:
#
#     Ω = Σ_l  tr(H_l)/n_l · ‖Q_b(W_l) − W_l‖²   +   Σ_a  tr(H_a)/n_a · E‖Q_b(x_a) − x_a‖²
#
# Traces of weights are Hutchinson's estimates E[vᵀHv], v = ±1, one product for all weights at once; those of inputs are
# E‖Jᵀu‖², u with covariance diag(p) − p·pᵀ.
HESSIAN_DEPARTURES = (
    "the loss is the cross-entropy against the model's own softmax, as calibration images have no labels: its gradient "
    "is zero at the float model and its Hessian is the Gauss-Newton matrix, the quadratic form of the KL divergence",
    "one Hessian-vector product serves all weights: what mixes in from other layers has mean zero",
    "traces of inputs are E‖Jᵀu‖² by ordinary backward passes, in which nothing mixes",
    "probes=16 on every piece=8 of the images, 64 samples from 32 images (ours; the paper was not at hand)",
    "an estimate below zero, which only noise can make, counts as zero",
)
"""Where ``hessian`` differs from HAWQ-V2, or the paper is silent."""


@checked
def hessian_sensitivity(
    candidates: Candidates,
    calibration: Calibration,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    probes: int = 16,
    piece: int = 8,
) -> tuple[Tensor, dict[str, Any]]:
    """Ω of every group and width, float64 [G, W]; and by group the trace for all its weights and the standard error of
    Ω at the middle width, as a share of it.

    probes: samples of every trace on every ``piece`` of images; an estimate below zero counts as zero. Raises
    QuantlensError.
    """
    if probes < 1 or piece < 1:
        raise QuantlensError(f"hessian: probes={probes}, piece={piece}; choose at least one probe and image")
    traces = Traces(candidates, probes)
    traces.collect([part for chunk in calibration for part in chunk.split(piece)], seed, progress)
    return traces.sensitivities(len(calibration))


class Traces:
    """Samples of the Hessian traces of every weight and input of the groups, and the squared errors of the inputs.

    samples: by edge key, one [] float tensor per probe and piece of images. errors: by edge key, ‖Q(x) − x‖² summed
    over all images, float64 [W]. sizes: by edge key, its numbers (of one image for an input).
    """

    def __init__(self, candidates: Candidates, probes: int):
        self.candidates, self.probes = candidates, probes
        graph, widths = candidates.graph, candidates.widths
        self.weights = [e for part in candidates.edges for e in part if e.is_weight]
        self.inputs = [e for part in candidates.edges for e in part if not e.is_weight]
        self.samples: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.errors = {e.key: torch.zeros(len(widths), dtype=torch.float64) for e in self.inputs}
        self.sizes = {e.key: graph.tensor(str(e.value.target)).numel() for e in self.weights}
        self._quantizers = {e.key: [candidates.quantizer(e, bits) for bits in widths] for e in self.inputs}
        self._shares = torch.zeros(0, dtype=torch.float64)

    def collect(self, pieces: Sequence[Tensor], seed: int, progress: Progress | None) -> None:
        """Fill ``samples``, ``errors`` and ``sizes`` from all calibration images: samples of the weights by Hessian
        products, of the inputs by gradients."""
        graph = self.candidates.graph
        generator = torch.Generator(device=graph.device).manual_seed(seed)
        total, done = 2 * len(pieces) * self.probes, 0
        for images in pieces:
            for _ in self._sampled(images, generator):
                done += 1
                if progress is not None:
                    progress(done, total)
        shares = torch.tensor([len(p) for p in pieces], dtype=torch.float64).repeat_interleave(self.probes)
        self._shares = shares / shares.sum()

    @torch.enable_grad()
    def _sampled(self, images: Tensor, generator: torch.Generator) -> Iterator[None]:
        """Take the samples of a piece of the images, one after the other."""
        note = partial(self._note, len(images))
        logits, leaves = with_leaves(self.candidates.graph, images.clone(), self.weights, self.inputs, note)
        for edges, sample in ((self.weights, hessian_samples), (self.inputs, gradient_samples)):
            chosen = [leaves[edge.key] for edge in edges]
            for values in sample(logits, chosen, self.probes, generator) if chosen else ():
                for edge, value in zip(edges, values, strict=True):
                    self.samples[edge.key].append(value.detach().cpu() / len(images))
                yield

    def _note(self, images: int, key: str, value: Tensor) -> None:
        """Add the squared errors of one input's values, [B, …] or [B·windows, …], at every width."""
        self.sizes[key] = value.numel() // images
        with torch.no_grad():
            plain = value.detach()
            self.errors[key] += torch.tensor([float((q(plain) - plain).square().sum()) for q in self._quantizers[key]])

    def sensitivities(self, images: int) -> tuple[Tensor, dict[str, Any]]:
        """Ω, float64 [G, W], and by group the trace for its weights and the relative standard error of Ω at the middle
        width."""
        shares, widths = self._shares, self.candidates.widths
        result = torch.zeros(len(self.candidates.groups), len(widths), dtype=torch.float64)
        info: dict[str, Any] = {"traces": [], "standard_errors": []}
        middle = len(widths) // 2
        for g, part in enumerate(self.candidates.edges):
            samples, weight_traces = shares.new_zeros(len(shares), len(widths)), shares.new_zeros(len(shares))
            for edge in part:
                values = torch.stack(self.samples[edge.key]).double()
                if edge.is_weight:
                    weight = self.candidates.graph.tensor(str(edge.value.target))
                    changes = (self.candidates.weight(edge, bits) - weight for bits in widths)
                    error = torch.stack([change.double().square().sum().cpu() for change in changes])
                    weight_traces += values
                else:
                    error = self.errors[edge.key] / images
                mean = (shares * values).sum()
                result[g] += mean.clamp_min(0) / self.sizes[edge.key] * error
                samples += (values / self.sizes[edge.key])[:, None] * error
            info["traces"].append(float((shares * weight_traces).sum()))
            info["standard_errors"].append(_relative_error(samples[:, middle], result[g, middle]))
        return result, info


def _relative_error(samples: Tensor, value: Tensor) -> float | None:
    """Standard error of the mean of ``samples`` [S], as a share of ``value``; None where there is none."""
    if len(samples) < 2:
        return None
    relative = float(samples.std() / len(samples) ** 0.5 / value)
    return relative if math.isfinite(relative) else None


def with_leaves(
    graph: Graph, images: Tensor, weights: Sequence[Edge], inputs: Sequence[Edge], seen: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [B, K] and the leaves to differentiate by: the weights on ``weights``, and a zero added to what crosses
    ``inputs`` ({edge key: leaf}). ``seen(key, value)`` is shown what crosses ``inputs``."""
    leaves = {e.key: graph.tensor(str(e.value.target)).detach().clone().requires_grad_() for e in weights}
    wanted = {e.key for e in inputs}

    def hook(key: str, value: Tensor) -> Tensor:
        if key in wanted:
            if seen is not None:
                seen(key, value)
            leaves[key] = torch.zeros_like(value).requires_grad_()
            return value + leaves[key]
        return leaves.get(key, value)

    calls = [node for node in graph.fx.nodes if node.op == "call_function"]
    return graph.run(calls, {graph.input: images}, hook=hook, keep=[graph.output])[graph.output], leaves


def soft_loss(logits: Tensor) -> Tensor:
    """Cross-entropy of logits [B, K] against their own softmax (held fixed), summed over images."""
    return -(logits.detach().softmax(-1) * logits.log_softmax(-1)).sum()


def hessian_samples(
    logits: Tensor, leaves: Sequence[Tensor], count: int, generator: torch.Generator
) -> Iterator[list[Tensor]]:
    """``count`` samples of vᵀHv for each leaf, v = ±1 on all of them: the mean is the trace of the leaf's own block of
    the Hessian of :func:`soft_loss`."""
    slopes = torch.autograd.grad(soft_loss(logits), leaves, create_graph=True)
    for _ in range(count):
        signs = [
            torch.randint(0, 2, leaf.shape, generator=generator, device=leaf.device).to(leaf.dtype).mul_(2).sub_(1)
            for leaf in leaves
        ]
        found = torch.autograd.grad(slopes, leaves, grad_outputs=signs, retain_graph=True)
        yield [(v * hv).sum() for v, hv in zip(signs, found, strict=True)]


def gradient_samples(
    logits: Tensor, leaves: Sequence[Tensor], count: int, generator: torch.Generator
) -> Iterator[list[Tensor]]:
    """``count`` samples of ‖Jᵀu‖² for each leaf, u with covariance diag(p) − p·pᵀ per image: the mean is the same
    trace."""
    p = logits.detach().softmax(-1)
    for _ in range(count):
        normal = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype) * p.sqrt()
        found = torch.autograd.grad(
            logits, leaves, grad_outputs=normal - p * normal.sum(-1, keepdim=True), retain_graph=True
        )
        yield [slope.square().sum() for slope in found]
