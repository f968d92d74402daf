"""What an exported file says of itself, read and checked: a damaged record is refused, in one sentence."""

import json
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quantlens.data.preprocess import Preprocess
from quantlens.errors import BadWeightsError, QuantlensError

if TYPE_CHECKING:
    from quantlens.models.detection import DetectionHead

TASKS = ("classify", "binary", "multilabel", "features", "zero-shot", "detect")

PLAN: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "method": (str,),
    "bits": (str,),
    "seed": (int,),
    "options": (dict,),
    "calibration": (dict,),
    "class_names": (list,),
    "checkpoint_sha256": (str,),
    "detection_head": (dict,),
}
"""Kinds of what the plan says; any of it may be missing."""


class Record(NamedTuple):
    """info: the plan's. guard: {"score", "keep", "threshold": {"value", "n", …} or None, …}."""

    info: dict[str, Any]
    preprocess: Preprocess
    guard: dict[str, Any]
    num_parameters: int
    task: str


def has_guard(model: Any) -> bool:
    """Whether a model's outputs are the logits of one label of several: what a guard's scores are of."""
    return model.task == "classify" and int(model.num_classes) > 1


def read_record(path: Path, metadata: Mapping[str, str]) -> Record:
    """Raises BadWeightsError for a file of another tool, and for a record that is damaged."""
    if "plan" not in metadata:
        raise BadWeightsError(
            f"{path} was not written by `quantlens export`: its metadata has no plan (`quantlens evaluate` measures "
            "files of other tools)"
        )
    try:
        info, guard = _mapping(metadata, "plan"), _mapping(metadata, "guard")
        for name, kinds in PLAN.items():
            if not isinstance(info.get(name), (*kinds, type(None))):
                raise ValueError(f"the plan's {name} is {info[name]!r}")
        preprocess = Preprocess.from_dict(_mapping(metadata, "preprocess"))
        count, task = int(metadata["num_parameters"]), metadata.get("task", "classify")
        if count < 0 or task not in TASKS:
            raise ValueError(f"num_parameters is {count}, the task {task!r}")
        _check_guard(guard)
    except KeyError as error:
        raise BadWeightsError(f"{path} is damaged: its metadata has no {error.args[0]}; export it again") from error
    except (ValueError, TypeError, AttributeError, QuantlensError) as error:
        raise BadWeightsError(f"{path} is damaged: its metadata cannot be read ({error}); export it again") from error
    return Record(info, preprocess, guard, count, task)


def read_head(path: Path, said: dict[str, Any] | None) -> "DetectionHead | None":
    """What a detector's outputs mean; None of another model. Raises BadWeightsError for what cannot be read."""
    if not said:
        return None
    from quantlens.models.detection import DetectionHead

    try:
        return DetectionHead.from_dict(said)
    except (TypeError, ValueError, KeyError, QuantlensError) as error:
        raise BadWeightsError(
            f"{path} is damaged: what it says of its boxes cannot be read ({error}); export it again"
        ) from error


def check_outputs(artefact: Any, names: list[str]) -> None:
    """Raises BadWeightsError for a file whose graph does not give what its record is about. names: of its outputs."""
    if not {"logits", "features"} & set(names) or (artefact.detection_head is not None and "boxes" not in names):
        raise BadWeightsError(
            f"{artefact.path} is damaged: it gives {', '.join(names) or 'nothing'} in place of logits, features or "
            "boxes; export it again"
        )
    classes, columns = len(artefact.class_names or ()), artefact.num_classes
    if artefact.task == "classify" and 0 < classes < columns:
        raise BadWeightsError(
            f"{artefact.path} is damaged: it names {classes} classes and gives {columns}; export it again"
        )


def names_in(text: str) -> list[str]:
    """Names of outputs (JSON); none where the text is damaged."""
    try:
        return [str(name) for name in json.loads(text)]
    except (ValueError, TypeError):
        return []


def _mapping(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        found = json.loads(metadata[name])
    except ValueError:
        raise ValueError(f"{name} is no JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} is {metadata[name][:40]!r}")
    return found


def _check_guard(guard: dict[str, Any]) -> None:
    """Raises KeyError or ValueError for a guard without a score, or with a threshold that is no number."""
    threshold = guard.setdefault("threshold", None)
    if not isinstance(guard["score"], str | None):
        raise ValueError(f"the guard's score is {guard['score']!r}")
    value = threshold.get("value") if isinstance(threshold, dict) else None
    if threshold is not None and (not isinstance(value, Real) or isinstance(value, bool)):
        raise ValueError(f"the guard's threshold is {threshold!r}")
