"""What a model gave on every single image, kept in one compressed file per cell: `DIR/outputs/<key>.npz`.

The metrics of a study are means; whether two of them differ by more than chance can only be seen on the images they
are means of. The metrics need no logits, and are computed from the vectors, so that they equal the store's to the last
digit. A score is kept in float32 where that keeps every two of its values apart, otherwise in float64: the order of the
images, which AUPR, AUROC and FPR@95 depend on, is exact.
"""

# A file holds, for N ID images and the M images of each OOD set,
#     labels, predicted, rank      int32 [N]    true class, largest logit, classes that stand before the true one
#     confidence, nll, brier       float64 [N]  as in `metrics.classification.PerImage`
#     logits                       float16 [N, K] of the ID images (float32 where float16 would overflow); optional
#     narrow, wide                 float32, float64 [scores, N + sum of M]: the OOD scores, ID images first
#     names                        UTF-8: names of the ID images, a zero byte between them; not in older files
#     about                        JSON: what was measured on which images, the names of the scores and sets, and those
#                                  of the classes that are true or predicted
# Other tasks than one label of several have no vectors from `predicted` to `brier` (format 2): `binary` and
# `multilabel` have labels uint8 [N, L] and always logits float32 [N, L]; `features` has, of what was measured, `knn1`
# and `linear1` (whether the image got its label) and `cosine` (to the FP32 model's features), float64 [N]; `detect` has
# labels of -1, the columns of all detections (`found.boxes` float32 [M, 4], …) and of all annotated boxes (`truth.…`),
# and numerators and denominators of the metrics of drift by image (`drift.lost` float64 [2, N], …).
# Where shifted images were measured (format 3), `shift.labels`, `shift.rank`, … hold the vectors of those of all sets,
# one after the other, and the rows of `narrow` and `wide` end in their scores, where there are any.

import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from quantlens.boxes import Boxes, Detections
from quantlens.errors import QuantlensError, StorageError

FORMAT = 3
FOLDER = "outputs"

VECTORS = {
    "labels": np.int32,
    "predicted": np.int32,
    "rank": np.int32,
    "confidence": np.float64,
    "nll": np.float64,
    "brier": np.float64,
}
ABOUT = ("model", "method", "bits", "seed", "n_bins", "id", "ood")
OF_FEATURES = ("knn1", "linear1", "cosine")
DAMAGED = (zipfile.BadZipFile, zlib.error, QuantlensError)
OF_DETECTORS = ("found", "truth", "drift")
SHIFT = "shift."
"""Before names of shifted sets among those of OOD sets, and of their vectors."""


def vectors_of(task: str | None) -> dict[str, Any]:
    """Names and types of the arrays [N] or [N, L] that are kept of every image of the ID set, by task."""
    if task in ("binary", "multilabel"):
        return {"labels": np.uint8, "logits": np.float32}
    return {"labels": np.int32} if task in ("features", "detect") else VECTORS


@dataclass(frozen=True, eq=False)
class Outputs:
    """Per-image outputs of one model (see above). `id_scores[score]` is [N], `ood_scores[set][score]` is [M], both
    float64; `about` has "model", "method", "bits", "seed", "n_bins", "id" and "ood" (fingerprint and group by set), and
    "task" unless it is one label of several. `hits`: the vectors of features, by metric. Of detectors: `detections`,
    the annotated boxes `truth`, both with the model's numbers of classes, and `drift` as of `metrics.box_drift`.
    `names`: of the ID images, None in older files; `classes`: names of those that are true or predicted, by number."""

    labels: np.ndarray
    id_scores: dict[str, np.ndarray]
    ood_scores: dict[str, dict[str, np.ndarray]]
    about: dict[str, Any]
    predicted: Any = None
    rank: Any = None
    confidence: Any = None
    nll: Any = None
    brier: Any = None
    logits: np.ndarray | None = None
    shift: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """the same vectors [S] by name, of the images of every shifted set (`about` has "shift", their fingerprints)"""
    shift_scores: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """as `ood_scores`, where there are scores"""
    hits: dict[str, np.ndarray] = field(default_factory=dict)
    detections: Detections | None = None
    truth: Boxes | None = None
    drift: dict[str, Any] = field(default_factory=dict)
    names: list[str] | None = None
    classes: dict[int, str] = field(default_factory=dict)

    @cached_property
    def matches(self) -> Any:
        """Of a detector: its detections matched with the annotated boxes, and {metric: (numerator, denominator) [N]}
        of what is a quotient of sums over images."""
        from quantlens.metrics.detection import object_calibration
        from quantlens.metrics.matching import match

        assert self.detections is not None
        assert self.truth is not None
        oce = object_calibration(self.detections, self.truth, len(self.labels))
        return match(self.detections, self.truth), {"oce": oce, **self.drift}

    @property
    def task(self) -> str:
        return str(self.about.get("task") or "classify")

    @property
    def groups(self) -> dict[str, str]:
        """OOD set -> "far" or "near"."""
        return {name: str(entry.get("group") or "far") for name, entry in self.about["ood"].items()}


def of_images(
    logits: np.ndarray, labels: np.ndarray, keep: bool | str, class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """The fields of `Outputs` that logits [N, K] and labels [N] give; `logits` is None unless `keep` is True. With
    labels [N, K] those of a sigmoid per label. class_names [K]: None where nobody knows them."""
    from quantlens.metrics.classification import per_image

    if np.ndim(labels) == 2:
        return {"labels": np.asarray(labels).astype(np.uint8), "logits": logits.astype(np.float32)}
    images = per_image(logits, labels)
    seen = [] if class_names is None else np.union1d(images.predicted, labels).tolist()
    fits = np.abs(logits).max(initial=0) <= np.finfo(np.float16).max
    return {
        **{name: getattr(images, name).astype(dtype) for name, dtype in VECTORS.items() if name != "labels"},
        "labels": np.asarray(labels).astype(np.int32),
        "logits": logits.astype(np.float16 if fits else np.float32) if keep is True else None,
        "classes": {k: str(class_names[k]) for k in seen} if class_names is not None else {},
    }


def about_of(
    model: Any,
    id_part: Mapping[str, Any],
    ood_part: Mapping[str, Mapping[str, Any]],
    n_bins: int,
    task: str = "classify",
) -> dict[str, Any]:
    """What the outputs of a model are of; the parts "id" and "ood" of its result say on which images."""
    return {
        **({} if task == "classify" else {"task": task}),
        "model": model.name,
        "method": model.method,
        "bits": model.bits,
        "seed": model.seed,
        "n_bins": n_bins,
        "id": {"fingerprint": id_part["fingerprint"]},
        "ood": {name: {key: part[key] for key in ("fingerprint", "group")} for name, part in ood_part.items()},
    }


# ---- files -----------------------------------------------------------------------------------------------------------


def path_of(directory: str | os.PathLike[str], key: str) -> Path:
    """Where the outputs of a cell are kept beside its store."""
    return Path(directory) / FOLDER / f"{key}.npz"


def pack(outputs: Outputs) -> bytes:
    """The content of the file."""
    others = {**outputs.ood_scores, **{f"{SHIFT}{name}": found for name, found in outputs.shift_scores.items()}}
    sizes = [(name, next(iter(scores.values())).size) for name, scores in others.items()]
    total = len(outputs.labels) + sum(size for _, size in sizes)
    rows: dict[str, dict[str, np.ndarray]] = {"narrow": {}, "wide": {}}
    for name, ids in outputs.id_scores.items():
        row = np.concatenate([ids, *(scores[name] for scores in others.values())])
        rows["narrow" if _apart_in_float32(row) else "wide"][name] = row
    about = {
        **outputs.about,
        "format": FORMAT if outputs.shift else 1 if vectors_of(outputs.task) is VECTORS else 2,
        **({"shifted": [(name, len(one["labels"])) for name, one in outputs.shift.items()]} if outputs.shift else {}),
        "sets": sizes,
        "scores": {kind: list(found) for kind, found in rows.items()},
        "order": list(outputs.id_scores),
        "classes": outputs.classes,
    }
    arrays = {name: getattr(outputs, name).astype(dtype) for name, dtype in vectors_of(outputs.task).items()}
    arrays |= {name: values.astype(np.float64) for name, values in outputs.hits.items()}
    arrays["narrow"] = np.array(list(rows["narrow"].values()), np.float32).reshape(-1, total)
    arrays["wide"] = np.array(list(rows["wide"].values()), np.float64).reshape(-1, total)
    if outputs.logits is not None and "logits" not in arrays:
        arrays["logits"] = outputs.logits
    if outputs.shift:
        vectors = {name: np.concatenate([one[name] for one in outputs.shift.values()]) for name in VECTORS}
        arrays |= {f"{SHIFT}{name}": values.astype(VECTORS[name]) for name, values in vectors.items()}
    for kind, boxes in (("found", outputs.detections), ("truth", outputs.truth)):
        columns = {} if boxes is None else vars(boxes)
        arrays |= {f"{kind}.{name}": values for name, values in columns.items() if isinstance(values, np.ndarray)}
    arrays |= {name: arrays[name].astype(np.float32) for name in ("found.boxes", "found.scores") if name in arrays}
    arrays |= {f"drift.{name}": np.stack(ratio).astype(np.float64) for name, ratio in outputs.drift.items()}
    if outputs.names is not None:
        joined = "\0".join(outputs.names).encode("utf-8", "surrogateescape")
        arrays["names"] = np.frombuffer(joined, np.uint8)
    text = json.dumps(about, sort_keys=True, allow_nan=False).encode()
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, about=np.frombuffer(text, np.uint8), **arrays)
    return stream.getvalue()


def _apart_in_float32(values: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    return bool(np.isfinite(narrow).all()) and np.unique(narrow).size == np.unique(values).size


def read(path: str | os.PathLike[str] | bytes, *, logits: bool = False) -> Outputs:
    """Read a file, or its content (`logits`: those too, where they were kept). Nothing in it is executed or unpickled.

    Raises StorageError for a file that is missing, damaged, or of a newer format.
    """
    content = io.BytesIO(path) if isinstance(path, bytes) else None
    path = "of a cell" if isinstance(path, bytes) else Path(path)
    try:
        with np.load(content or path, allow_pickle=False) as file:
            about = json.loads(bytes(file["about"]).decode())
            if about["format"] > FORMAT:
                raise StorageError(
                    f"the per-image outputs {path} were written by a newer quantlens (format {about['format']}, this "
                    f"one reads {FORMAT}); install that version"
                )
            wanted = {*vectors_of(about.get("task")), "narrow", "wide"}
            wanted |= {name for name in (*OF_FEATURES, "names", *(["logits"] if logits else [])) if name in file.files}
            wanted |= {name for name in file.files if name.partition(".")[0] in OF_DETECTORS}
            wanted |= {f"{SHIFT}{name}" for name in VECTORS} if "shifted" in about else set()
            return _unpacked(about, {name: file[name] for name in wanted})
    except FileNotFoundError:
        raise StorageError(
            f"there are no per-image outputs {path}; `quantlens evaluate --keep FILE` writes them, and a study that is "
            "run into another --out directory"
        ) from None
    except StorageError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        QuantlensError,
    ) as error:
        reason = str(error) or type(error).__name__
        raise StorageError(
            f"the per-image outputs {path} are damaged ({reason}); delete the file to compare without intervals, or "
            "run the study into another --out directory to make them anew"
        ) from error


def _of_shift(sizes: Sequence[Sequence[Any]], arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The vectors of every shifted set; ValueError where they do not belong together."""
    ends = np.cumsum([0, *(int(size) for _, size in sizes)])
    vectors = {name: arrays[f"{SHIFT}{name}"] for name in VECTORS if sizes}
    if any(values.shape != (ends[-1],) or not np.isfinite(values).all() for values in vectors.values()):
        raise ValueError("what is kept of shifted images does not hold as many numbers as there are images")
    parts = {name: np.split(values, ends[1:-1]) for name, values in vectors.items()}
    return {str(name): {key: part[i] for key, part in parts.items()} for i, (name, _) in enumerate(sizes)}


def _unpacked(about: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Outputs:
    """Checked outputs; ValueError where shapes, types or values do not belong together."""
    vectors, n = vectors_of(about.get("task")), len(arrays["labels"])
    detected: dict[str, Any] = _of_detector(arrays, n) if about.get("task") == "detect" else {}
    hits = [name for name in OF_FEATURES if name in arrays]
    sizes = [(str(name), int(size)) for name, size in about["sets"]]
    ends = np.cumsum([n, *(size for _, size in sizes)])
    many = arrays["labels"].shape if "logits" in vectors else (n,)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys((*vectors, *hits), many)
    shapes |= {kind: (len(names), ends[-1]) for kind, names in about["scores"].items()}
    for name, shape in shapes.items():
        if arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} does not hold {shape} numbers")
    oods = [name for name, _ in sizes if not name.startswith(SHIFT)]
    if 0 in (n, *(size for _, size in sizes)) or set(about["ood"]) != set(oods):
        raise ValueError("the image sets are not those of the scores, or one is empty")
    logits = arrays.get("logits")
    if logits is not None and len(logits) != n:
        raise ValueError("the logits do not fit the images")
    named = _named(arrays.get("names"))
    if named is not None and len(named) != n:
        raise ValueError("the names do not fit the images")
    rows: dict[str, np.ndarray] = {}
    for kind, names in about["scores"].items():
        rows |= dict(zip(names, arrays[kind].astype(np.float64), strict=True))
    parts = {name: np.split(rows[name], ends[:-1]) for name in about["order"]}
    scores = {name: {score: part[i + 1] for score, part in parts.items()} for i, (name, _) in enumerate(sizes)}
    return Outputs(
        **{name: arrays[name] for name in vectors if name != "logits"},  # type: ignore[arg-type]
        id_scores={name: part[0] for name, part in parts.items()},
        ood_scores={name: scores[name] for name in oods},
        about={key: about[key] for key in (*ABOUT, *({"task", "shift"} & about.keys()))},
        shift=_of_shift(about.get("shifted", ()), arrays),
        shift_scores={name.removeprefix(SHIFT): scores[name] for name in scores if name.startswith(SHIFT)},
        logits=logits,
        hits={name: arrays[name] for name in hits},
        names=named,
        classes={int(number): str(name) for number, name in about.get("classes", {}).items()},
        **detected,
    )


def _named(packed: np.ndarray | None) -> list[str] | None:
    return None if packed is None else packed.tobytes().decode("utf-8", "surrogateescape").split("\0")


def _of_detector(arrays: Mapping[str, np.ndarray], n: int) -> dict[str, Any]:
    """The fields that a detector has; ValueError or QuantlensError where they do not belong together."""
    parts: dict[str, dict[str, Any]] = {kind: {} for kind in OF_DETECTORS}
    for name, values in arrays.items():
        kind, _, column = name.partition(".")
        if kind in parts:
            parts[kind][column] = values
    detections, truth = Detections(**parts["found"]), Boxes(**parts["truth"])
    images = [rows.image.max(initial=-1) < n for rows in (detections, truth)]
    if not all(images) or any(v.shape != (2, n) or not np.isfinite(v).all() for v in parts["drift"].values()):
        raise ValueError("the boxes are of other images")
    drift = {name: tuple(ratio) for name, ratio in parts["drift"].items()}
    return {"detections": detections, "truth": truth, "drift": drift}
