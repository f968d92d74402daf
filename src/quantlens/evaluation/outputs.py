"""What a model gave on every single image, kept in one compressed file per cell: `DIR/outputs/<key>.npz`.

The metrics of a study are means; whether two of them differ by more than chance can only be seen on the images they
are means of. A file holds, for N ID images and the M images of each OOD set,

    labels, predicted, rank      int32 [N]    true class, largest logit, classes that stand before the true one
    confidence, nll, brier       float64 [N]  as in `metrics.classification.PerImage`
    logits                       float16 [N, K] of the ID images (float32 where float16 would overflow); optional
    narrow, wide                 float32, float64 [scores, N + sum of M]: the OOD scores, ID images first
    about                        JSON: what was measured on which images, and the names of the scores and sets

The metrics need no logits, and are computed from the vectors, so that they equal the store's to the last digit; half
precision is for whoever asks something new of the logits. A score is kept in float32 where that keeps every two of its
values apart, otherwise in float64: the order of the images, which AUPR, AUROC and FPR@95 depend on, is exact.
"""

import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantlens.errors import StorageError

FORMAT = 1
FOLDER = "outputs"

VECTORS = {
    "labels": np.int32,
    "predicted": np.int32,
    "rank": np.int32,
    "confidence": np.float64,
    "nll": np.float64,
    "brier": np.float64,
}


@dataclass(frozen=True, eq=False)
class Outputs:
    """Per-image outputs of one model (see above). `id_scores[score]` is [N], `ood_scores[set][score]` is [M], both
    float64; `about` has "model", "method", "bits", "seed", "n_bins", "id" and "ood" (fingerprint and group by set)."""

    labels: np.ndarray
    predicted: np.ndarray
    rank: np.ndarray
    confidence: np.ndarray
    nll: np.ndarray
    brier: np.ndarray
    id_scores: dict[str, np.ndarray]
    ood_scores: dict[str, dict[str, np.ndarray]]
    about: dict[str, Any]
    logits: np.ndarray | None = None

    @property
    def groups(self) -> dict[str, str]:
        """OOD set -> "far" or "near"."""
        return {name: str(entry.get("group") or "far") for name, entry in self.about["ood"].items()}


def of_images(logits: np.ndarray, labels: np.ndarray, keep: bool | str) -> dict[str, Any]:
    """The fields of `Outputs` that logits [N, K] and labels [N] give; `logits` is None unless `keep` is True."""
    from quantlens.metrics.classification import per_image

    images = per_image(logits, labels)
    fits = np.abs(logits).max(initial=0) <= np.finfo(np.float16).max
    return {
        **{name: getattr(images, name).astype(dtype) for name, dtype in VECTORS.items() if name != "labels"},
        "labels": np.asarray(labels).astype(np.int32),
        "logits": logits.astype(np.float16 if fits else np.float32) if keep is True else None,
    }


def about_of(
    model: Any, id_part: Mapping[str, Any], ood_part: Mapping[str, Mapping[str, Any]], n_bins: int
) -> dict[str, Any]:
    """What the outputs of a model are of; the parts "id" and "ood" of its result say on which images."""
    return {
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
    sizes = [(name, next(iter(scores.values())).size) for name, scores in outputs.ood_scores.items()]
    total = outputs.labels.size + sum(size for _, size in sizes)
    rows: dict[str, dict[str, np.ndarray]] = {"narrow": {}, "wide": {}}
    for name, ids in outputs.id_scores.items():
        row = np.concatenate([ids, *(scores[name] for scores in outputs.ood_scores.values())])
        rows["narrow" if _apart_in_float32(row) else "wide"][name] = row
    about = {
        **outputs.about,
        "format": FORMAT,
        "sets": sizes,
        "scores": {kind: list(found) for kind, found in rows.items()},
        "order": list(outputs.id_scores),
    }
    arrays = {name: getattr(outputs, name).astype(dtype) for name, dtype in VECTORS.items()}
    arrays["narrow"] = np.array(list(rows["narrow"].values()), np.float32).reshape(-1, total)
    arrays["wide"] = np.array(list(rows["wide"].values()), np.float64).reshape(-1, total)
    if outputs.logits is not None:
        arrays["logits"] = outputs.logits
    text = json.dumps(about, sort_keys=True, allow_nan=False).encode()
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, about=np.frombuffer(text, np.uint8), **arrays)
    return stream.getvalue()


def _apart_in_float32(values: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    return bool(np.isfinite(narrow).all()) and np.unique(narrow).size == np.unique(values).size


def read(path: str | os.PathLike[str], *, logits: bool = False) -> Outputs:
    """Read a file (`logits`: those too, where they were kept). Nothing in it is executed or unpickled.

    Raises StorageError for a file that is missing, damaged, or of a newer format.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(bytes(file["about"]).decode())
            if about["format"] > FORMAT:
                raise StorageError(
                    f"the per-image outputs {path} were written by a newer quantlens (format {about['format']}, this "
                    f"one reads {FORMAT}); install that version"
                )
            wanted = [*VECTORS, "narrow", "wide", *(["logits"] if logits and "logits" in file.files else [])]
            return _unpacked(about, {name: file[name] for name in wanted})
    except FileNotFoundError:
        raise StorageError(
            f"the per-image outputs {path} are missing; run the study into another --out directory to make them anew"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error) or type(error).__name__
        raise StorageError(
            f"the per-image outputs {path} are damaged ({reason}); delete the file to compare without intervals, or "
            "run the study into another --out directory to make them anew"
        ) from error


def _unpacked(about: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Outputs:
    """Checked outputs; ValueError where shapes, types or values do not belong together."""
    n = arrays["labels"].size
    sizes = [(str(name), int(size)) for name, size in about["sets"]]
    ends = np.cumsum([n, *(size for _, size in sizes)])
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(VECTORS, (n,))
    shapes |= {kind: (len(names), ends[-1]) for kind, names in about["scores"].items()}
    for name, shape in shapes.items():
        if arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} does not hold {shape} numbers")
    if 0 in (n, *(size for _, size in sizes)) or set(about["ood"]) != {name for name, _ in sizes}:
        raise ValueError("the image sets are not those of the scores, or one is empty")
    logits = arrays.get("logits")
    if logits is not None and len(logits) != n:
        raise ValueError("the logits do not fit the images")
    rows: dict[str, np.ndarray] = {}
    for kind, names in about["scores"].items():
        rows |= dict(zip(names, arrays[kind].astype(np.float64), strict=True))
    parts = {name: np.split(rows[name], ends[:-1]) for name in about["order"]}
    return Outputs(
        **{name: arrays[name] for name in VECTORS},
        id_scores={name: part[0] for name, part in parts.items()},
        ood_scores={name: {score: part[i + 1] for score, part in parts.items()} for i, (name, _) in enumerate(sizes)},
        about={key: about[key] for key in ("model", "method", "bits", "seed", "n_bins", "id", "ood")},
        logits=logits,
    )
