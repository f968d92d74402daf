"""What the store says of a cell besides its metrics: the labels, sources and fingerprints of the study that ran it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantlens.evaluation.images import source_name
from quantlens.studies.cells import CELL_FORMAT, INSPECTION_FORMAT, PlannedCell, StudyImages
from quantlens.studies.config import StudyConfig


def spec_of(cell: PlannedCell, config: StudyConfig, images: StudyImages) -> dict[str, Any]:
    """What a cell is, for a reader of the store: with the labels and sources that this study uses. The checkpoint and
    the preprocessing are None until the model has been loaded (`store.OF_THE_MODEL`)."""

    def listed(source: Any) -> dict[str, Any]:
        return {"source": source_name(source), "fingerprint": images.mark(source), "n": len(source)}

    common = {
        "model": cell.model.label,
        "architecture": cell.model.name,
        "weights": cell.model.weights,
        "model_options": cell.model.options,
        "checkpoint_sha256": None,
        "method": cell.method_label,
        "method_name": "fp32" if cell.method is None else cell.method.name,
        "method_version": None if cell.method is None else cell.method.version,
        "bits": cell.bits,
        "seed": cell.seed,
        "options": {} if cell.method is None else cell.method.options,
        "preprocess": None,
    }
    if cell.inspects:
        return common | {"inspects": True, "images": listed(images.inspected), "format": INSPECTION_FORMAT}
    calibration = None
    if cell.method is not None and config.calibration is not None:
        drawn = images.calibration[cell.seed]
        calibration = {
            "source": config.calibration.drawn(cell.seed),
            "n": len(drawn),
            "fingerprint": images.mark(drawn),
        }
    return common | {
        "calibration": calibration,
        "id": listed(images.id),
        "ood": {name: {**listed(s), "group": images.groups[name]} for name, s in images.ood.items()},
        "fit": None if images.fit is None else listed(images.fit),
        "scores": None if config.scores is None else list(config.scores),
        "format": CELL_FORMAT,
        **({} if config.attention is None else {"attention": config.attention.model_dump()}),
    }


def reason(error: str | None) -> str:
    """The last line of a traceback, without the exception's module."""
    lines = (error or "").strip().splitlines()
    last = lines[-1] if lines else "unknown reason"
    name, colon, message = last.partition(": ")
    return f"{message}" if colon and name.startswith("quantlens.errors.") else last


def label(spec: Mapping[str, Any]) -> str:
    """A cell in words, as `PlannedCell` spells it."""
    if spec.get("method_name") == "fp32":
        return f"{spec.get('model')} FP32"
    if spec.get("inspects"):
        return f"{spec.get('model')} inspection {spec.get('bits')}"
    return f"{spec.get('model')} {spec.get('method')} {spec.get('bits')} seed {spec.get('seed')}"
