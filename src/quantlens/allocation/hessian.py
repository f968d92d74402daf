"""hessian: the sensitivity of HAWQ-V2 (Dong et al., NeurIPS 2020; arXiv 1911.03852).

For a group at b bits it is the sum, over its layers l and their inputs a, of the mean Hessian eigenvalue times the
squared error of quantization:

    Ω = Σ_l  tr(H_l)/n_l · ‖Q_b(W_l) − W_l‖²   +   Σ_a  tr(H_a)/n_a · E‖Q_b(x_a) − x_a‖²

Traces of weights are Hutchinson's estimates E[vᵀHv], v = ±1, one product for all weights at once; those of inputs are
E‖Jᵀu‖², u with covariance diag(p) − p·pᵀ. The loss is the cross-entropy against the model's own softmax, as calibration
images have no labels. :data:`DEPARTURES` lists the differences from the paper.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantlens.allocation.sensitivity import Candidates
from quantlens.calibration import Calibration
from quantlens.errors import QuantlensError
from quantlens.graph import Edge, Graph
from quantlens.methods.base import Progress

DEPARTURES = (
    "the loss is the cross-entropy against the model's own softmax, as calibration images have no labels: its gradient "
    "is zero at the float model and its Hessian is the Gauss-Newton matrix, the quadratic form of the KL divergence",
    "one Hessian-vector product serves all weights: what mixes in from other layers has mean zero",
    "traces of inputs are E‖Jᵀu‖² by ordinary backward passes, in which nothing mixes",
    "probes=16 on every piece=8 of the images, 64 samples from 32 images (ours; the paper was not at hand)",
    "an estimate below zero, which only noise can make, counts as zero",
)
"""Where this file differs from HAWQ-V2, or the paper is silent."""


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
            samples = torch.zeros(len(shares), len(widths), dtype=torch.float64)
            weight_traces = torch.zeros(len(shares), dtype=torch.float64)
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
