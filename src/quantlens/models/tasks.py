"""What a model's outputs are for: one label of several, yes or no, several labels, features, or boxes."""

from typing import Any

from torch import Tensor, nn

from quantlens.errors import UnknownNameError, UnsupportedError
from quantlens.models.detection import scores_and_boxes

TASKS = ("classify", "binary", "multilabel", "features", "zero-shot", "detect")


def check_task(task: str | None) -> str | None:
    """The task as given. Raises UnknownNameError."""
    if task is not None and task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    return task


def task_of(module: nn.Module, given: Any = None) -> str:
    """The task of a module, by what its configuration says (Hugging Face's ``problem_type`` and ``num_labels``), by the
    size of its classifier (timm's ``num_classes``), or by what it gives for an image; "classify" where nothing tells.

    Raises UnsupportedError for a regression.
    """
    config: Any = getattr(module, "config", None)
    if hasattr(config, "model_type"):
        return _of_config(type(module).__name__, config)
    if scores_and_boxes(given) is not None:
        return "detect"
    classes = getattr(module, "num_classes", None)
    if isinstance(classes, int) and classes < 2:
        return "binary" if classes == 1 else "features"
    if isinstance(given, Tensor) and given.dim() > 0 and classes is None:
        return {1: "binary", 2: "binary" if given.shape[-1] == 1 else "classify"}.get(given.dim(), "features")
    return "classify"


def _of_config(name: str, config: Any) -> str:
    if name.endswith("ForObjectDetection"):
        return "detect"
    if "ForImageClassification" not in name:
        return "zero-shot" if name.endswith("VisionModelWithProjection") else "features"
    problem, labels = getattr(config, "problem_type", None), int(getattr(config, "num_labels", 2))
    if problem == "multi_label_classification":
        return "multilabel" if labels > 1 else "binary"
    if problem == "regression":
        raise UnsupportedError(
            f"{name} is a regression of {labels} number{'s' * (labels > 1)}, which has no classes: accuracy and "
            "calibration say nothing of it; say task='features' to measure the features"
        )
    return "binary" if labels == 1 else "classify"
