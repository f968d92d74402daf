"""How far two distributions, or a signal and its quantized form, are apart; of torch tensors, with gradient."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

Reduction = Literal["none", "sum", "mean"]

OutputKind = Literal["softmax", "sigmoid", "values"]
"""What a model gives: logits of one class of several, logits of yes or no each, or plain values, such as features."""


def kl_divergence(log_p: Tensor, log_q: Tensor, reduction: Reduction = "none") -> Tensor:
    """KL(p ‖ q) in nats of log-probabilities [B, K], in their dtype.

    reduction: "none" gives every row's [B], at least 0; "sum" and "mean" reduce over the rows.
    """
    if reduction == "none":
        terms = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
        return terms.sum(-1).clamp_min(0)
    name = "batchmean" if reduction == "mean" else reduction
    return nn.functional.kl_div(log_q, log_p, reduction=name, log_target=True)


def kl_of_logits(reference: Tensor, other: Tensor, reduction: Reduction = "none") -> Tensor:
    """KL(softmax(reference) ‖ softmax(other)) of logits [B, K], as :func:`kl_divergence`."""
    return kl_divergence(reference.log_softmax(-1), other.log_softmax(-1), reduction)


def outputs_of(model: Any) -> OutputKind:
    """What a :class:`quantlens.models.Model` gives, by its task and its detection head."""
    task, scoring = getattr(model, "task", "classify"), getattr(getattr(model, "detection_head", None), "scoring", "")
    if task in ("binary", "multilabel") or scoring == "sigmoid":
        return "sigmoid"
    return "values" if task in ("features", "zero-shot") else "softmax"


def damage(expected: Tensor, got: Tensor, outputs: OutputKind, reduction: Literal["sum", "mean"] = "mean") -> Tensor:
    """How far outputs [B, ..., K] are from the float model's, summed over the images or their mean: KL of softmaxes,
    KL of sigmoids summed over the K labels, or mean squared difference of values; a detector's summed over queries."""
    if outputs == "values":
        total = (got - expected).square().mean(-1).sum()
        return total / len(got) if reduction == "mean" else total
    if outputs == "sigmoid":
        expected, got = as_choices(expected), as_choices(got)
    return kl_of_logits(expected, got, reduction)


def fisher_noise(logits: Tensor, outputs: OutputKind, generator: torch.Generator) -> Tensor:
    """Random normal v like ``logits`` [B, ..., K] with E[v·vᵀ] the Hessian of :func:`damage` there, summed over images:
    diag(p) − p·pᵀ of a softmax p, diag(p(1 − p)) of sigmoids, 2/K of values."""
    normal = torch.randn(logits.shape, generator=generator, device=generator.device, dtype=logits.dtype).to(logits)
    if outputs == "values":
        return normal * math.sqrt(2 / logits.shape[-1])
    if outputs == "sigmoid":
        p = logits.sigmoid()
        return normal * (p * (1 - p)).sqrt()
    p = logits.softmax(-1)
    noise = normal * p.sqrt()
    return noise - p * noise.sum(-1, keepdim=True)


def as_choices(logits: Tensor) -> Tensor:
    """Logits x of sigmoids as those of two classes each, −x/2 and x/2, whose softmax they are: [..., 2]."""
    return torch.stack([-logits / 2, logits / 2], dim=-1)


BOX_WEIGHT = 100.0
"""Nats that a box is worth that is off by its own size in one direction."""

SMOOTH = 1e-5
"""Square of the distance below which :func:`box_shift` is flat."""


def box_error(got: Tensor, expected: Tensor, objects: Tensor) -> Tensor:
    """Squared distance of boxes [B, Q, 4] (centre, width, height) from the float model's in units of the latter's size,
    times the probability of an object there [B, Q], times :data:`BOX_WEIGHT`; summed over queries, mean over images."""
    sizes = expected[..., 2:].clamp_min(0.01)
    relative = (got - expected) / torch.cat([sizes, sizes], -1)
    return BOX_WEIGHT * (relative.square().sum(-1) * objects).sum() / len(got)


def box_shift(got: Tensor, expected: Tensor, objects: Tensor) -> Tensor:
    """Sum over the four numbers of a box of their distances from the float model's, in units of its size, otherwise as
    :func:`box_error`. Near zero it is smooth. Squares see the few boxes that are far off, this sees all."""
    sizes = expected[..., 2:].clamp_min(0.01)
    relative = (got - expected) / torch.cat([sizes, sizes], -1)
    return BOX_WEIGHT * ((relative.square() + SMOOTH).sqrt().sum(-1) * objects).sum() / len(got)


def box_iou(got: Tensor, expected: Tensor) -> Tensor:
    """IoU [B, Q] of boxes [B, Q, 4] (centre, width, height)."""
    low = torch.maximum(got[..., :2] - got[..., 2:] / 2, expected[..., :2] - expected[..., 2:] / 2)
    high = torch.minimum(got[..., :2] + got[..., 2:] / 2, expected[..., :2] + expected[..., 2:] / 2)
    shared = (high - low).clamp_min(0).prod(-1)
    return shared / (got[..., 2:].prod(-1) + expected[..., 2:].prod(-1) - shared).clamp_min(1e-12)


def objects_of(logits: Tensor, sigmoid: bool) -> Tensor:
    """Probability [B, Q] that a detector's query found an object, of its class logits: sigmoids, or a softmax whose
    last class is none."""
    return logits.sigmoid().amax(-1) if sigmoid else 1 - logits.softmax(-1)[..., -1]


def sqnr_db(signal: float, noise: float) -> float | None:
    """Signal over quantization noise, 10·log₁₀(Σ x² / Σ (x − x̂)²), from the two sums; None where one of them is 0."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
