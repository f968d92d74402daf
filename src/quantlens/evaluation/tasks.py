"""What a model is for, which labels its images need, and what is measured of what it gives.

classify    logits [N, K], one label of K: a softmax
zero-shot   the same, the classes being texts (`evaluation.zero_shot`)
binary      one logit, labels 0 and 1 [N]: a sigmoid
multilabel  logits [N, L], labels [N, L] of 0 and 1: a sigmoid each
features    features [N, D] of a model without a classifier, or those that its classifier reads; labels [N] are
            optional
detect      class logits and boxes of queries; annotated boxes in place of labels (`evaluation.detection`)
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.graph import Graph, classifier_terms, walk
from quantlens.metrics import TASKS, FitData, classification_metrics, knn_classes, label_metrics, linear_classes
from quantlens.metrics.labels import multi_hot

ONE_LABEL = ("classify", "zero-shot")
SIGMOID = ("binary", "multilabel")


def task_of(model: Any, asked: str | None = None, texts: bool = False) -> str:
    """The task that a model is measured as: the one asked for, else the model's own, "classify" where it says none; one
    logit is binary. texts: whether text embeddings are given.

    Raises UnknownNameError, and UnsupportedError for a task that is not measured here or does not fit what is given.
    """
    if asked is not None and asked not in TASKS:
        raise UnknownNameError("task", asked, TASKS)
    if "detect" in (asked, own_task(model)):
        return _detect(model, asked, texts)
    one = int(model.num_classes) == 1
    task = str(asked or ("zero-shot" if texts else own_task(model)))
    if task not in TASKS:
        raise UnsupportedError(
            f"{model.name} is a model for {task!r}, which evaluate does not measure; it measures {', '.join(TASKS)}"
        )
    if texts:
        if task not in ("zero-shot", "multilabel"):
            raise UnsupportedError(f"text embeddings are for the tasks 'zero-shot' and 'multilabel', not {task!r}")
        return task
    if task == "zero-shot":
        raise UnsupportedError(
            f"{model.name} is measured as 'zero-shot' against text embeddings: give them with text_embeddings, or "
            "measure its features with task='features'"
        )
    if one and (task == "multilabel" or (task == "classify" and asked is None)):
        return "binary"
    if one and task == "classify":
        raise UnsupportedError(f"{model.name} gives one logit, which is a sigmoid's: its task is 'binary'")
    if task == "binary" and not one:
        raise UnsupportedError(
            f"{model.name} gives {model.num_classes} logits and a binary model one; measure two classes with "
            "task='classify', several labels with task='multilabel'"
        )
    return task


def _detect(model: Any, asked: str | None, texts: bool) -> str:
    if own_task(model) != "detect":
        raise UnsupportedError(f"{model.name} is no detector, as it gives no boxes: task 'detect' is not for it")
    if asked not in (None, "detect") or texts:
        raise UnsupportedError(
            f"{model.name} is a detector, and only its detections are measured: its task is 'detect'"
        )
    if hasattr(model, "recorded"):
        raise UnsupportedError(f"{model.name}: a file of logits has no boxes; give the detector itself, or its file")
    return "detect"


def own_task(model: Any) -> str:
    """The task that a model says it is for."""
    of_file = (getattr(model, "info", None) or {}).get("task")
    found = getattr(model, "task", None) or getattr(getattr(model, "provenance", None), "task", None) or of_file
    return str(found or "classify")


def embedding(model: Any, outputs: Any) -> Any:
    """The features [B, D] of a batch's outputs: what the model gives, or of a classifier what its last layer reads."""
    classifier = own_task(model) not in ("features", "zero-shot") and outputs.features is not None
    return outputs.features if classifier else outputs.logits


def same_axes(model: Any, reference: Any) -> bool:
    """Whether a quantized classifier's features have the axes of the FP32 model's: not those of an older checkpoint,
    which does not say how to get them back, where the last LayerNorm went into the classifier or its output was
    rotated. True where no graph tells."""
    graphs: list[Graph] = [one.graph for one in (model, reference) if getattr(one, "graph", None) is not None]
    if own_task(model) in ("features", "zero-shot") or len(graphs) < 2 or graphs[0].axes:
        return True
    first, second = ({name: graph.tensor(name) for name in _shaping(graph)} for graph in graphs)
    return first.keys() == second.keys() and all(
        first[name].shape == second[name].shape and torch.allclose(first[name], second[name].to(first[name]))
        for name in first
    )


def _shaping(graph: Graph) -> Iterator[str]:
    """Names of the tensors that act on what a classifier reads after the last layers before it."""

    def onward(node: fx.Node) -> list[fx.Node]:
        site = graph.sites.by_node.get(node)
        if site is not None and site.kind in ("linear", "conv"):
            return []
        norm = site is not None and site.kind == "layer_norm"
        return node.all_input_nodes[1:] if norm else node.all_input_nodes

    read = [node.args[0] for node, _ in classifier_terms(graph) or ()]
    return (str(node.target) for node in walk(read, onward) if graph.constant(node) is not None)


def check_labels(images: Any, task: str, num_classes: int) -> np.ndarray | None:
    """The labels of an image set as a task needs them (int64 [N], bool [N, L], or None of features without labels).
    Raises QuantlensError for labels that do not fit."""
    labels = images.labels
    if labels is None and task == "features":
        return None
    if labels is None and task in SIGMOID:
        raise QuantlensError(f"{images.source} has no labels, and the metrics of task {task!r} need them")
    if task in SIGMOID:
        return multi_hot(labels, len(images), num_classes, f"labels of {images.source}")
    if np.ndim(labels) == 2:
        raise QuantlensError(
            f"the labels of {images.source} have shape {labels.shape} and task {task!r} takes one class number per "
            "image; measure a model with a sigmoid per label with task='multilabel'"
        )
    return np.asarray(labels) if task == "features" else images.check_labels(num_classes)


def check_same_classes(first: Any, second: Any) -> None:
    """Raise QuantlensError where two labelled sets name other classes, so that their class numbers do not agree."""
    one, two = (getattr(images, "class_names", None) for images in (first, second))
    if one is not None and two is not None and list(one) != list(two):
        raise QuantlensError(
            f"{first.source} and {second.source} have other classes ({len(one)} and {len(two)}, by name); a "
            "k-NN classifier and a linear probe are fitted on images of the classes that are evaluated"
        )


def id_metrics(
    task: str, logits: np.ndarray, labels: np.ndarray, *, n_bins: int, names: Sequence[str] | None
) -> dict[str, Any]:
    """The metrics of logits [N, K] against labels, of every task but "features"."""
    if task in SIGMOID:
        return label_metrics(logits, labels, n_bins=n_bins, label_names=names)
    return {"num_classes": logits.shape[1], **classification_metrics(logits, labels, n_bins=n_bins, class_names=names)}


def feature_hits(
    features: np.ndarray, labels: np.ndarray | None, fit: FitData | None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Of features [N, D]: whether each classifier that is fitted on the fit images' features gives an image its label,
    {metric: bool [N]}, and {metric: why it cannot be had}."""
    makers = {"knn1": knn_classes, "linear1": linear_classes}
    reason = ""
    if labels is None:
        reason = "needs labels of the ID images"
    elif fit is None:
        reason = "is fitted on labelled images of the same classes: give a `fit` set"
    elif fit.labels is None:
        reason = "needs labels of the fit images"
    elif np.unique(fit.labels).size < 2:
        reason = "needs fit images of at least two classes"
    if reason:
        return {}, dict.fromkeys(makers, reason)
    bank: Any = fit
    return {name: make(features, bank.features, bank.labels) == labels for name, make in makers.items()}, {}
