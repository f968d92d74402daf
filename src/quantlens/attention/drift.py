"""How far a quantized model's attention is from the float model's, image by image.

All functions take batches. Attention rows are distributions over N tokens; maps are weights over P patches.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import logsigmoid

from quantlens.attention.recording import Lens, has_classes, lens_of, probabilities
from quantlens.errors import QuantlensError
from quantlens.metrics.divergence import kl_divergence

TINY = 1e-12
"""Added to a quantized probability before its logarithm is taken: log formats hold exact zeros."""
TOP = 0.1
"""Share of patches whose overlap is measured (the 20 largest of 196)."""
CHUNK = 8
"""Images looked at at once: maps of more of them (45 MB for 8 of DeiT-Tiny) cost time, as they leave the cache."""
SPREAD = 6.0
RATIO = 1.5
COUNTS = ("outliers", "outliers_fp32", "large_tokens", "large_tokens_fp32")
BY_BLOCK = ("row_cosine", "row_kl", "outliers", "outliers_fp32", "outlier_overlap")
BY_HEAD = ("row_cosine", "row_kl")

Arrays = dict[str, np.ndarray]


class Drift(SimpleNamespace):
    """Drift of one quantized model on n images: arrays, first dimension the image.

    row_cosine, row_kl, entropy_change [n, L, H]: of attention rows (class and patch tokens alike), mean over rows; L
    blocks, H heads. rollout_spearman, rollout_overlap, centre_movement [n]: of rollout maps; overlap of the :data:`TOP`
    largest patches; movement as a share of the image's diagonal. outliers, large_tokens [n, L]: outlier tokens and
    large tokens after every block (:func:`outlier_tokens`, :func:`large_tokens`), outliers_fp32 and large_tokens_fp32
    those of the float model; outlier_overlap [n, L]: positions in common (intersection over union).
    prediction_changed, confidence_change [n]. output_kl [n]: KL(float ‖ quantized) of the class probabilities, nats (of
    several labels their sum);    the last three are missing for a model of features, which has no classes.
    """

    def per_image(self) -> Arrays:
        """One value per image and metric [n]: means over blocks and heads, numbers of tokens over all blocks."""
        return {name: _per_image(name, values) for name, values in vars(self).items()}

    def summary(self) -> dict[str, Any]:
        """Means over images as JSON-able numbers, and per block (``blocks``) and head (``heads``, [L][H])."""
        values = vars(self)
        totals = {name: values[name].sum(axis=1) for name in COUNTS}
        means = {name: float(array.mean(dtype=np.float64)) for name, array in (values | totals).items()}
        heads = {name: values[name] for name in BY_HEAD}
        blocks = {name: values[name] for name in BY_BLOCK} | {name: array.mean(axis=2) for name, array in heads.items()}
        return {"n": len(self.rollout_spearman), **means, "blocks": _mean_image(blocks), "heads": _mean_image(heads)}


def _per_image(name: str, values: np.ndarray) -> np.ndarray:
    if name in COUNTS:
        return values.sum(axis=1)
    return values if values.ndim == 1 else values.mean(axis=tuple(range(1, values.ndim)), dtype=np.float64)


def _mean_image(arrays: Arrays) -> dict[str, list]:
    """Means over images in six decimals."""
    return {name: a.mean(axis=0, dtype=np.float64).round(6).tolist() for name, a in arrays.items()}


def measure(reference: Any, others: Mapping[str, Any], batches: Iterable[Tensor], **rollout: Any) -> dict[str, Drift]:
    """Drift of ``others`` (label -> model) from ``reference`` on batches of images [B, 3, H, W].

    One forward pass per model and batch; of the maps only those of :data:`CHUNK` images are alive. rollout: settings of
    :func:`~quantlens.attention.rollout.rollout`.
    Raises QuantlensError without images, UnsupportedError for models without global attention.
    """
    lenses: dict[Any, Lens] = {None: lens_of(reference)}
    lenses |= {label: lens_of(model) for label, model in others.items()}
    pieces = (piece for batch in batches for piece in batch.split(CHUNK))
    found = [observe(lenses, piece, rollout)[1] for piece in pieces]
    if not found:
        raise QuantlensError("no images to measure attention drift on")
    return {label: Drift(**arrays) for label, arrays in joined(found).items()}


def joined(parts: Sequence[dict[Any, Arrays]]) -> dict[Any, Arrays]:
    """By label, arrays of successive images as one of all."""
    return {
        label: {name: np.concatenate([part[label][name] for part in parts]) for name in arrays}
        for label, arrays in parts[0].items()
    }


@torch.inference_mode()
def observe(
    lenses: Mapping[Any, Lens], images: Tensor, rollout: Mapping[str, Any]
) -> tuple[dict[Any, Arrays], dict[Any, Arrays]]:
    """What models (by label, the first one the reference) see of a few images, and the drift of all but the reference.

    What was seen: "maps" [B, rows, columns], "norms" of patch tokens and which are "outliers" and "large" [B, L, P],
    "predicted" and "confidence" [B] of a model with classes.
    """
    reference, *others = lenses
    first = _Seen(lenses[reference], images, rollout)
    rows = [Rows(probs) for probs in first.view.probs]
    seen, drifts = {reference: _arrays(first.kept)}, {}
    for label in others:
        same = lenses[label].model is lenses[reference].model
        other = first if same else _Seen(lenses[label], images, rollout)
        seen[label], drifts[label] = _arrays(other.kept), _arrays(_drift(first, rows, other))
    return seen, drifts


def _arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    return {name: values.cpu().numpy() for name, values in tensors.items()}


class _Seen:
    """A view of B images, its rollout maps [B, P], and what is kept of both (see :func:`observe`)."""

    def __init__(self, lens: Lens, images: Tensor, rollout: Mapping[str, Any]):
        self.view, self.layout = lens(images), lens.layout
        self.map = lens.rollout_of(self.view, **rollout)
        norms = torch.stack([token_norms(t, self.layout.prefix) for t in self.view.tokens], dim=1)
        self.kept = {
            "maps": self.map.unflatten(1, self.layout.grid),
            "norms": norms,
            "outliers": outlier_tokens(norms),
            "large": large_tokens(norms),
        }
        if has_classes(lens.model):
            self.kept["confidence"], self.kept["predicted"] = probabilities(lens.model, self.view.logits).max(1)
        self.log_probabilities = self.view.logits.log_softmax(1)
        if lens.model.task == "multilabel":  # two classes for every label
            self.log_probabilities = logsigmoid(torch.stack([-self.view.logits, self.view.logits], dim=-1))


def _drift(first: _Seen, first_rows: "Sequence[Rows]", second: _Seen) -> dict[str, Tensor]:
    if len(first_rows) != len(second.view.probs) or first.layout != second.layout:
        raise QuantlensError("the two models have different blocks or patches; drift compares one model's precisions")
    of_rows = []
    for reference, probs in zip(first_rows, second.view.probs, strict=True):
        rows = Rows(probs)
        change = (rows.entropy - reference.entropy).mean(-1)
        of_rows.append((reference.cosine_to(rows), reference.kl_to(rows), change))
    cosine, kl, entropy_change = (torch.stack(values, dim=1) for values in zip(*of_rows, strict=True))
    a, b = first.kept, second.kept
    return {
        "row_cosine": cosine,
        "row_kl": kl,
        "entropy_change": entropy_change,
        "rollout_spearman": spearman(first.map, second.map),
        "rollout_overlap": top_overlap(first.map, second.map),
        "centre_movement": movement(first.map, second.map, first.layout.grid),
        "outliers": b["outliers"].sum(-1).float(),
        "outliers_fp32": a["outliers"].sum(-1).float(),
        "outlier_overlap": token_overlap(a["outliers"], b["outliers"]),
        "large_tokens": b["large"].sum(-1).float(),
        "large_tokens_fp32": a["large"].sum(-1).float(),
    } | (_change_of_classes(first, second) if "predicted" in a else {})


def _change_of_classes(first: _Seen, second: _Seen) -> dict[str, Tensor]:
    a, b = first.kept, second.kept
    return {
        "prediction_changed": b["predicted"] != a["predicted"],
        "confidence_change": b["confidence"] - a["confidence"],
        "output_kl": kl_divergence(first.log_probabilities, second.log_probabilities)
        .reshape(len(first.map), -1)
        .sum(1),
    }


def map_drift(reference: np.ndarray, other: np.ndarray) -> Arrays:
    """Of maps [n, rows, columns] twice: "spearman", "overlap" (of the :data:`TOP` largest) and "movement", each [n]."""
    if reference.shape != other.shape:
        raise QuantlensError("the two models' maps have different sizes; drift compares one model's precisions")
    a, b = (torch.from_numpy(m).flatten(1) for m in (reference, other))
    found = {"spearman": spearman(a, b), "overlap": top_overlap(a, b), "movement": movement(a, b, reference.shape[1:])}
    return _arrays(found)


# -- rows of attention ------------------------------------------------------------------------------------------------
def _log(values: Tensor) -> Tensor:
    """Natural logarithm; on the CPU by numpy, whose vector code is three times as fast as torch's."""
    if values.device.type == "cpu" and not values.requires_grad:
        return torch.from_numpy(np.log(values.numpy()))
    return values.log()


class Rows:
    """Attention rows of a block [B, H, N, N] with what is needed of them for every comparison, computed once.

    Rows are read as distributions: negative values as 0, :data:`TINY` added, divided by their sum. A row of zeros (all
    of it below half a step of its quantizer) is therefore uniform.
    """

    def __init__(self, probs: Tensor):
        self.probs = probs
        self.norm = probs.norm(dim=-1)
        self.weights = probs.clamp_min(0).add_(TINY)
        self.logs = _log(self.weights)
        self.total = self.weights.sum(-1)
        self.entropy = self.total.log() - (self.weights * self.logs).sum(-1) / self.total
        """Entropy of every row in nats: [B, H, N]."""

    def cosine_to(self, other: "Rows") -> Tensor:
        """Mean cosine similarity of rows: [B, H]."""
        dot = (self.probs * other.probs).sum(-1)
        return (dot / (self.norm * other.norm).clamp_min(TINY)).mean(-1)

    def kl_to(self, other: "Rows") -> Tensor:
        """Mean KL(self ‖ other) of rows in nats: [B, H]."""
        cross = other.total.log() - (self.weights * other.logs).sum(-1) / self.total
        return (cross - self.entropy).mean(-1).clamp_min(0)


# -- maps -------------------------------------------------------------------------------------------------------------
def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of maps: [B, P] twice -> [B]. 1 for equal maps, 0 where one is constant and the
    other is not."""
    a, b = (torch.from_numpy(rankdata(m.cpu().numpy(), axis=-1)).to(m.device) for m in (first, second))
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    size = a.norm(dim=-1) * b.norm(dim=-1)
    found = torch.where(size > 0, (a * b).sum(-1) / size.clamp_min(TINY), 0.0)
    return torch.where((first == second).all(-1), 1.0, found).float()


def top_overlap(first: Tensor, second: Tensor, share: float = TOP) -> Tensor:
    """Which part of the largest patches, a ``share`` of all, two maps [B, P] have in common: [B]."""
    k = max(1, round(share * first.shape[-1]))
    top = torch.zeros_like(first, dtype=torch.bool).scatter_(1, first.topk(k, dim=1).indices, True)
    return top.gather(1, second.topk(k, dim=1).indices).float().mean(1)


def centre(maps: Tensor, grid: Sequence[int]) -> Tensor:
    """Centre of mass of maps [B, P] on a grid of (rows, columns), as shares of height and width: [B, 2]; the middle
    for an empty map."""
    rows, columns = grid
    weights = maps.clamp_min(0).view(-1, rows, columns)
    total = weights.sum((1, 2))
    y = (torch.arange(rows, device=maps.device) + 0.5) / rows
    x = (torch.arange(columns, device=maps.device) + 0.5) / columns
    found = torch.stack([(weights.sum(2) * y).sum(1), (weights.sum(1) * x).sum(1)], dim=1)
    return torch.where(total[:, None] > 0, found / total.clamp_min(TINY)[:, None], torch.full_like(found, 0.5))


def movement(first: Tensor, second: Tensor, grid: Sequence[int]) -> Tensor:
    """How far the centre of mass moves between two maps [B, P], as a share of the image's diagonal: [B]."""
    return (centre(first, grid) - centre(second, grid)).norm(dim=1) / 2**0.5


# -- tokens -----------------------------------------------------------------------------------------------------------
def token_norms(tokens: Tensor, prefix: int = 0) -> Tensor:
    """Euclidean norms of patch tokens: [B, N, C] (or [B, H, W, C]) -> [B, P], class and register tokens left out."""
    return tokens.flatten(1, -2)[:, prefix:].norm(dim=-1)


def quantile(values: Tensor, q: float) -> Tensor:
    """Quantile along the last dimension, which is kept with size 1, interpolated between neighbours: of an even number
    of values the median is the mean of the middle two."""
    ordered = values.sort(dim=-1).values
    place = q * (values.shape[-1] - 1)
    low, high = ordered[..., [math.floor(place)]], ordered[..., [math.ceil(place)]]
    return low + (place - math.floor(place)) * (high - low)


def outlier_tokens(norms: Tensor) -> Tensor:
    """Which of the norms [..., P] of patch tokens stand far out of their image's others (Darcet et al., ICLR 2024,
    section 2): bool [..., P].

    They cut at a fixed norm that fits one model. Precisions and models have norms of different size, so the rule here
    is relative to the image: a norm that exceeds the image's median by more than :data:`SPREAD` robust standard
    deviations (1.4826·MAD) and is at least :data:`RATIO` times that median.
    """
    middle = quantile(norms, 0.5)
    deviation = 1.4826 * quantile((norms - middle).abs(), 0.5)
    return (norms > middle + SPREAD * deviation) & (norms >= RATIO * middle)


def large_tokens(norms: Tensor) -> Tensor:
    """Which of the norms [..., P] are at least :data:`RATIO` times the lower quartile of their row: bool [..., P].

    Where many tokens are large, the median and the spread are theirs, and none is an outlier; what is then seen in a
    picture is counted by this.
    """
    quartile = quantile(norms, 0.25)
    return (norms >= RATIO * quartile) & (norms > quartile)


def token_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Share of positions that two sets of outliers (bool [B, P]) have in common, intersection over union: [B]; 1 where
    neither has any."""
    both, either = (first & second).sum(-1), (first | second).sum(-1)
    return torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(both, dtype=torch.float32))
