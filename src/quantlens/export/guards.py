"""The guard of an exported file: the out-of-distribution scores that it can carry, how each is written into the file,
and which of them tells the images given from OOD-like images made of them.

A Mahalanobis score needs statistics of features, the input of the classifier: means of classes and one covariance for
all. They are fitted on every other image, the first, third, …; what is said of the score is measured on the rest, as
images that it was fitted on lie nearer than others.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx

from quantlens.calibration import Calibration
from quantlens.calibration.images import MOST, OOD_VIEWS
from quantlens.data import ImageSet, Source, as_image_set
from quantlens.errors import UnsupportedError
from quantlens.graph import classifier_terms
from quantlens.metrics import ood_metrics, score_label, threshold_keeping
from quantlens.metrics.ood_scores import class_means, energy, gen, maxlogit, msp, tied_covariances, whitening
from quantlens.qmodel import QuantizedModel
from quantlens.qmodel.simulation import float_features

GUARDS = {"msp": msp, "energy": energy, "maxlogit": maxlogit, "gen": gen}
"""Scores of the logits that a file can carry; larger means more in-distribution."""

MAHALANOBIS, NONE = "mahalanobis", "none"
OFFERED = (*GUARDS, MAHALANOBIS, NONE)
"""What `guard` can be."""

FEWEST = 16
"""Images from which a score is chosen; twice as many where half of them are for the statistics of features."""

ENOUGH = 256
"""Images that the scores are compared on, at most."""

GAMMA, TOP = 0.1, 100
"""GEN's exponent, and the number of classes it looks at."""


def guard_images(given: Any, preprocess: Any) -> ImageSet:
    """In-distribution images for a guard: a SOURCE, an image set, a tensor, a pair with labels."""
    whole = isinstance(given, str | tuple | Source | ImageSet)
    return as_image_set(given, preprocess, "images given", most=None if whole else MOST)


def _batches(images: ImageSet, preprocess: Any, **settings: Any) -> Calibration:
    """Checked, and in chunks. Raises QuantlensError for no images, and for values that are not finite."""
    return Calibration.of(images if images.values is None else images.values, preprocess, **settings)


def _half(images: ImageSet, start: int) -> ImageSet:
    """Every other image, so that both halves have the classes of images that are sorted by class."""
    return images.select(np.arange(start, len(images), 2))


# ---- a Mahalanobis score ---------------------------------------------------------------------------------------------


class Gaussians(NamedTuple):
    """The score -min_c |(h - centre) matrix + shift - means_c|² of features h [D] as the graph has them: matrix [D, r]
    whitens, means [C, r] are those of the classes. info: what it was fitted on."""

    centre: np.ndarray
    matrix: np.ndarray
    shift: np.ndarray
    means: np.ndarray
    info: dict[str, Any]


@torch.no_grad()
def fit_gaussians(qmodel: QuantizedModel, images: ImageSet) -> Gaussians:
    """What `metrics.ood_scores.fit_mahalanobis` fits, of every other image. Classes are the labels or, without labels,
    those predicted. Raises UnsupportedError for fewer than twice :data:`FEWEST` images, and for a model whose
    classifier reads no features [B, D] that differ."""
    if len(images) < 2 * FEWEST:
        raise UnsupportedError(
            f"the score {MAHALANOBIS!r} is fitted on one half of the guard images, its threshold on the other: give at "
            f"least {2 * FEWEST} images, or another score"
        )
    lacking = UnsupportedError(
        f"the score {MAHALANOBIS!r} needs features [batch, D] that a linear layer makes the logits of, and "
        f"{qmodel.name} has none that differ between images; choose another score"
    )
    fitted, logits, own = _half(images, 0), [], []
    for batch in _batches(fitted, qmodel.preprocess, device=qmodel.device):
        found = qmodel.simulation()(batch)
        if found[1] is None:
            raise lacking
        logits.append(found[0].float())
        own.append(found[1].float())
    raw = torch.cat(own)
    features = float_features(qmodel.graph, raw).cpu().double().numpy()
    labels = None if fitted.labels is None or fitted.labels.ndim > 1 else fitted.labels
    classes = torch.cat(logits).argmax(1).cpu().numpy() if labels is None else labels
    means, row = class_means(features, classes)
    whiten = whitening(tied_covariances(features, means, row)[0])
    if not whiten.shape[1]:  # all are equal
        raise lacking
    centre, origin = raw.mean(0), means.mean(0)
    away = float_features(qmodel.graph, torch.stack([centre, torch.zeros_like(centre)])).cpu().double().numpy()
    unit = float_features(qmodel.graph, torch.eye(len(centre), device=raw.device)).cpu().double().numpy()
    parts = (centre.cpu(), (unit - away[1]) @ whiten, (away[0] - origin) @ whiten, (means - origin) @ whiten)
    held = dict(zip(Gaussians._fields, (np.asarray(part, np.float32) for part in parts), strict=False))
    said = "predicted" if labels is None else "given"
    return Gaussians(**held, info={"n": len(features), "classes": len(means), "labels": said})


# ---- written into a file ---------------------------------------------------------------------------------------------


def write_score(e: Any, guard: str, logits: str, gaussians: Gaussians | None) -> None:
    """Write the output ``score`` [batch] of an ONNX graph, whose logits have that name. e: its Emitter."""
    if guard == "energy":
        e.op("ReduceLogSumExp", logits, [1], out="score", keepdims=0)
    elif guard == "gen":
        _write_gen(e, logits)
    elif gaussians is not None:
        read = [e.read(source) for source in sources(e.graph)]
        features = read[0] if len(read) == 1 else e.op("Concat", *read, axis=1)
        white = e.op("MatMul", e.op("Sub", features, gaussians.centre), gaussians.matrix)
        white, means = e.op("Add", white, gaussians.shift), gaussians.means
        close = e.op("Sub", e.op("MatMul", white, means.T), 0.5 * (means**2).sum(1))
        nearest = e.op("Gather", means, e.op("ArgMax", close, axis=1, keepdims=0), axis=0)
        e.op("Neg", e.op("ReduceSumSquare", e.op("Sub", white, nearest), [1], keepdims=0), out="score")
    else:
        scored = e.op("Softmax", logits, axis=1) if guard == "msp" else logits
        e.op("ReduceMax", scored, [1], out="score", keepdims=0)


def _write_gen(e: Any, logits: str) -> None:
    """p (1 - p) of the largest p is taken from what the other classes have together: 1 - p itself rounds to 0 in
    float32 where its 0.1-th power is still 0.2."""
    classes = int(e.sizes(e.graph.output)[-1])
    falling, _ = e.ops("TopK", logits, [classes], outs=2, axis=1)

    def ranks(start: int, stop: int) -> str:
        return e.op("Slice", falling, [start], [stop], [1])

    first, second = ranks(0, 1), ranks(1, 2)
    others = e.op("ReduceSum", e.op("Exp", e.op("Sub", ranks(1, classes), second)), [1])
    others = e.op("Add", e.op("Log", others), e.op("Sub", second, first))  # log of their sum, where the first's is 0
    total = e.op("Log", e.op("Add", e.op("Exp", others), 1.0))
    largest = e.op("Exp", e.op("Mul", e.op("Sub", others, e.op("Add", total, total)), GAMMA))
    log_p = e.op("Sub", e.op("Sub", ranks(1, min(TOP, classes)), first), total)
    rest = e.op("Pow", e.op("Sub", 1.0, e.op("Exp", log_p)), GAMMA)
    rest = e.op("ReduceSum", e.op("Mul", e.op("Exp", e.op("Mul", log_p, GAMMA)), rest), [1])
    e.op("Neg", e.op("Squeeze", e.op("Add", largest, rest), [1]), out="score")


def add_score(graph: fx.Graph, root: torch.nn.Module, features: fx.Node, gaussians: Gaussians) -> fx.Node:
    """The same of a graph of torch, before its output, with the statistics as buffers of ``root``."""
    aten, held = torch.ops.aten, {}
    for name, value in zip(Gaussians._fields, gaussians[:4], strict=False):
        root.register_buffer(f"guard_{name}", torch.from_numpy(value))
        held[name] = graph.get_attr(f"guard_{name}")

    def call(target: Any, *args: Any) -> fx.Node:
        return graph.call_function(target, args)

    white = call(aten.matmul.default, call(aten.sub.Tensor, features, held["centre"]), held["matrix"])
    white = call(aten.add.Tensor, white, held["shift"])
    half_squares = call(aten.mul.Tensor, call(aten.sum.dim_IntList, call(aten.square.default, held["means"]), [1]), 0.5)
    close = call(aten.matmul.default, white, call(aten.t.default, held["means"]))
    nearest = call(aten.argmax.default, call(aten.sub.Tensor, close, half_squares), 1)
    away = call(aten.sub.Tensor, white, call(aten.index_select.default, held["means"], 0, nearest))
    return call(aten.neg.default, call(aten.sum.dim_IntList, call(aten.square.default, away), [1]))


def sources(graph: Any) -> list[fx.Node]:
    """What the classifier's linear layers read, as :meth:`QuantizedModel.outputs` has it."""
    return list(dict.fromkeys(node.args[0] for node, _ in classifier_terms(graph) or ()))  # type: ignore[misc]


# ---- which score, and its threshold ----------------------------------------------------------------------------------


def guarded(
    said: dict[str, Any], choose: bool, images: ImageSet, gaussians: Gaussians | None, opened: Callable[..., Any]
) -> dict[str, Any]:
    """What a file says of its guard, measured in its runtime: "score", "keep", "threshold" (:func:`guard_threshold`),
    of a Mahalanobis score "fitted", and where the score is chosen "separation" (:func:`separations`).
    opened: a file that says so much, in its runtime (:class:`~quantlens.export.exported.Artefact`)."""
    held = images if gaussians is None else _half(images, 1)  # what nothing was fitted on
    if choose and len(held) >= FEWEST:
        tried = opened({**said, "score": said["score"] if gaussians is None else MAHALANOBIS})
        said = {**said, "separation": separations(tried, held)}
        means = separation_means(said)
        said["score"] = max(means, key=means.__getitem__)
    if gaussians is not None and said["score"] == MAHALANOBIS:
        said, images = {**said, "fitted": gaussians.info}, held
    return {**said, "threshold": guard_threshold(opened(said), images, said["keep"])}


def separation_means(said: Mapping[str, Any]) -> dict[str, float]:
    """The mean of :func:`separations` over the kinds of OOD-like images, by score; empty where nothing was chosen."""
    return {name: float(np.mean(list(views.values()))) for name, views in (said.get("separation") or {}).items()}


def guard_sentences(said: Mapping[str, Any]) -> list[str]:
    """What a file says of its guard, in words: score and threshold, what it was fitted on, why it was chosen."""
    if said["score"] is None:
        return ["no OOD score"]
    found, threshold = [f"{score_label(said['score'])} score, "], said["threshold"]
    if not threshold:
        found[0] += "no threshold (give --guard-images)"
    else:
        found[0] += f"unknown below {threshold['value']:.3f}"
        if "kept" in threshold:
            found[0] += f": keeps {100 * threshold['kept']:.1f} % of {threshold['n']} images ({threshold['images']})"
    if fitted := said.get("fitted"):
        kinds = f"{fitted['classes']} classes, labels {fitted['labels']}"
        found.append(f"the score was fitted on {fitted['n']} other images ({kinds})")
    if means := separation_means(said):
        shown = ", ".join(f"{score_label(name)} {100 * value:.1f}" for name, value in means.items())
        found.append(f"the score was chosen by AUROC (%) against OOD-like images made of these: {shown}")
    return found


def separations(artefact: Any, images: ImageSet) -> dict[str, dict[str, float]]:
    """AUROC of each score that the file offers, by kind of OOD-like image, between the images (at most :data:`ENOUGH`,
    drawn) and those made of them (`calibration.images.OOD_VIEWS`), in the runtime."""
    names = [*GUARDS, *([MAHALANOBIS] if artefact.guard["score"] == MAHALANOBIS else [])]
    generator = torch.Generator().manual_seed(0)
    drawn = images.select(torch.randperm(len(images), generator=generator)[:ENOUGH].numpy())
    makers: dict[str, Any] = {"": None, **{view.__name__: view for view in OOD_VIEWS}}
    found: dict[str, list[list[np.ndarray]]] = {view: [] for view in makers}
    for batch in _batches(drawn, artefact.preprocess):
        for view, make in makers.items():
            logits, own = artefact.run((batch if make is None else make(batch, generator)).numpy())
            found[view].append([GUARDS[name](logits) if name in GUARDS else own for name in names])
    known, *made = (np.concatenate(parts, 1) for parts in found.values())  # each [scores, images]
    return {
        name: {view: ood_metrics(known[k], part[k])["auroc"] for view, part in zip([*makers][1:], made, strict=True)}
        for k, name in enumerate(names)
    }


def guard_threshold(artefact: Any, images: Any, keep: float) -> dict[str, Any]:
    """{"value", "n", "kept", "images"}: the score that at least the share ``keep`` of the in-distribution images
    reaches, in the runtime, whether they come together or one by one (sums differ in their last bits, and codes with
    them)."""
    found, score, images = [], GUARDS.get(artefact.guard["score"]), guard_images(images, artefact.preprocess)
    for batch in _batches(images, artefact.preprocess):
        together = batch.numpy()
        alone = [artefact.run(image) for image in np.split(together, len(together))]
        runs = [artefact.run(together), tuple(np.concatenate(part) for part in zip(*alone, strict=True))]
        said = [scores for _, scores in runs] + [score(logits) for logits, _ in runs if score is not None]
        found.append(np.min(said, axis=0))
    scores = np.concatenate(found)
    value = threshold_keeping(scores, keep)
    return {"value": value, "n": len(scores), "kept": float((scores >= value).mean()), "images": str(images.source)}


# ---- how often it is right ----------------------------------------------------------------------------------------


def looks_unknown(
    guard: Mapping[str, Any] | None, logits: np.ndarray, scores: np.ndarray | None = None
) -> np.ndarray | None:
    """Which images [n] a file's guard calls unknown, from its logits [n, K], or from scores
    [n] of its own where they are of something else; None without a threshold.

    guard: ``{"score", "keep", "threshold": {"value", "n"} or None}``, as the file's metadata holds it.
    """
    threshold = (guard or {}).get("threshold")
    if guard is None or not threshold:
        return None
    if guard["score"] in GUARDS:
        scores = GUARDS[guard["score"]](logits)
    return None if scores is None else scores < float(threshold["value"])


def guard_metrics(
    guard: Mapping[str, Any] | None, known: np.ndarray | None, others: Mapping[str, np.ndarray | None]
) -> dict[str, Any] | None:
    """How often a guard is right on images that it was not set on; None for a guard without a threshold.

    known: :func:`looks_unknown` of the in-distribution images; others: that of every OOD set.
    Returns the guard itself with ``"id": {"n", "kept"}`` (share of ID images that look known) and for every OOD set
    ``{"n", "flagged", "balanced_accuracy"}`` (share that looks unknown; mean of kept and flagged).
    """
    if guard is None or known is None:
        return None
    kept = float((~known).mean())
    sets: dict[str, Any] = {}
    for name, unknown in others.items():
        if unknown is not None:
            flagged = float(unknown.mean())
            sets[name] = {"n": len(unknown), "flagged": flagged, "balanced_accuracy": (kept + flagged) / 2}
    return {**guard, "id": {"n": len(known), "kept": kept}, "ood": sets}
