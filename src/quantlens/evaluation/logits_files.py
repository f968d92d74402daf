"""Files of logits: what a model gave on images, computed elsewhere. `.npz` or `.csv` (docs/foreign.md has the columns).

A file stands for a model that was run already: it is measured without images, or against image sets, whose number,
names and labels its rows must then match.
"""

import csv
import hashlib
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlens.data import ImageSet, open_source
from quantlens.data.sources import FINGERPRINT_DIGITS
from quantlens.errors import BadWeightsError, QuantlensError, QuantlensWarning, UnknownNameError, first_line
from quantlens.evaluation.foreign import PROBABILITIES, About
from quantlens.evaluation.foreign_files import sha256
from quantlens.evaluation.images import EvaluationImages, groups_of, refuse_overlap
from quantlens.evaluation.tasks import check_labels

ID, FIT, OOD = "the ID set", "the fit set", "OOD set "
"""How an evaluation calls its image sets."""
COLUMNS = ("path", "label", "logit_0, logit_1, …", "feature_0, feature_1, …")


@dataclass(frozen=True, eq=False)
class Rows:
    """What a model gave on N images: logits float32 [N, K]; labels int64 [N] (of several labels [N, K]), features
    float32 [N, D] and ids (names of the images), each None where the file has none. bare: there are features alone,
    which stand in `logits`."""

    place: str
    logits: np.ndarray
    labels: np.ndarray | None = None
    features: np.ndarray | None = None
    ids: list[str] | None = None
    bare: bool = False

    def images(self) -> ImageSet:
        """The rows as a set of images that nobody can look at."""
        names = self.ids or [f"row {i}" for i in range(len(self.logits))]
        labels = None if self.labels is None else self.labels.tolist()
        digest = hashlib.sha256(repr((names, labels)).encode()).hexdigest()
        return ImageSet(names, self.labels, self.place, digest[:FINGERPRINT_DIGITS])


class LogitsFile(About):
    """A file of logits as a model. Its rows are those of the ID images; a `.npz` may have OOD sets and fit images."""

    def __init__(self, path: str | Path, **given: Any) -> None:
        self.path = Path(path)
        super().__init__("logits", self.path.stem, **given)
        self.parts, self._classifier = read(self.path)
        if ID not in self.parts:
            raise BadWeightsError(f"{self.path} has no logits of ID images; name them `logits` (docs/foreign.md)")
        self.num_classes = self.parts[ID].logits.shape[1]
        for part in self.parts.values():
            _check_width(part, self.num_classes)
        labels = self.parts[ID].labels
        many = (
            "binary"
            if self.num_classes == 1
            else "multilabel"
            if labels is not None and labels.ndim == 2
            else "classify"
        )
        self.task = self.task or ("features" if self.parts[ID].bare else many)
        self.foreign |= {"file": self.path.name, "sha256": sha256([self.path]), "task": self.task}
        logits = self.parts[ID].logits
        self._probabilities = self.task == "classify" and _sum_to_one(logits)
        if self._probabilities:
            warnings.warn(
                f"{self.path} holds probabilities, not logits: their logarithm is measured, of which maxlogit is MSP "
                "and energy is constant",
                QuantlensWarning,
                stacklevel=2,
            )

    def classifier(self) -> tuple[Tensor, Tensor] | None:
        return self._classifier

    def open_sets(
        self,
        id: Any,
        ood: Mapping[str, Any] | None,
        fit: Any,
        groups: Mapping[str, str] | None,
        pixels: bool,
        task: str,
        opened: Callable[[Any, str], Any],
    ) -> EvaluationImages:
        """The image sets of an evaluation: those given, and of what is not given the rows themselves.

        ood: values may be files of logits, too. pixels: whether a float model has to see the images, so that rows alone
        will not do. opened: (images, name of the set) -> an ImageSet with pixels.
        """
        named = [name.removeprefix(OOD) for name in self.parts if name.startswith(OOD)]
        if pixels and (id is None or (ood is None and named)):
            what = "id, the ID images" if id is None else f"ood, the images of {', '.join(named)} (or {{}})"
            raise QuantlensError(f"{self.path} holds no images that the float model could be run on; give {what}")
        own = dict.fromkeys(named) if ood is None else ood

        def part(given: Any, what: str) -> Any:
            if isinstance(given, str | Path) and Path(given).suffix in (".npz", ".csv") and Path(given).is_file():
                rows = read(Path(given))[0].get(ID)
                if rows is None:
                    raise BadWeightsError(f"{given} has no logits; name them `logits` (docs/foreign.md)")
                _check_width(rows, self.num_classes)
                self.parts[what] = rows
                given = None
            if what not in self.parts:
                raise UnknownNameError(f"part of {self.path}", what, self.parts, "give a file of its logits")
            if given is None:
                if pixels:
                    raise QuantlensError(f"{what}: the float model needs the images; give their SOURCE")
                return self.parts[what].images()
            images = opened(given, what) if pixels or not isinstance(given, str) else _listed(given)
            self.recorded(images, what)  # whatever does not match is told before anything is run
            return images

        id_images = part(id, ID)
        check_labels(id_images, task, self.num_classes)
        oods = {str(name): part(value, f"{OOD}{name}") for name, value in own.items()}
        fits = part(fit, FIT) if fit is not None or (FIT in self.parts and not pixels) else None
        if fits is not None:
            refuse_overlap(fits, FIT, id_images, ID)
        return EvaluationImages(id_images, oods, fits, groups_of(oods, groups))

    def recorded(self, images: Any, what: str, task: str = "") -> tuple[np.ndarray, np.ndarray | None]:
        """(logits [n, K], or for the task "features" these, and features [n, D] or None) of images in their order.
        Raises QuantlensError where the rows are not theirs: another number, names or labels."""
        if what not in self.parts:
            raise UnknownNameError(f"part of {self.path}", what, self.parts, "give a file of its logits")
        rows = self.parts[what]
        order = _order(rows, images, what)
        if rows.labels is not None and images.labels is not None:
            differ = rows.labels[order] != images.labels
            wrong = np.flatnonzero(differ.any(axis=1) if np.ndim(differ) == 2 else differ)
            if wrong.size:
                first = int(wrong[0])
                raise QuantlensError(
                    f"{rows.place} and {images.source} disagree on the labels of {wrong.size} of {len(images)} images, "
                    f"first of {images.names[first]} ({rows.labels[order][first]} and {images.labels[first]}): are the "
                    "rows in the order of the images, and the classes numbered alike?"
                )
        if task == "features" and rows.features is not None:
            return rows.features[order], None
        logits = rows.logits[order]
        if self._probabilities:
            logits = np.log(np.maximum(logits, np.finfo(np.float32).tiny))
        return logits, None if rows.features is None else rows.features[order]


def _listed(source: str) -> ImageSet:
    """The images of a SOURCE by name and label; none is read."""
    found = open_source(source)
    return ImageSet(
        list(found.names),
        found.labels,
        found.spec,
        found.fingerprint(),
        class_names=found.class_names,
        group=found.group,
    )


def _check_width(rows: Rows, classes: int) -> None:
    if rows.logits.shape[1] != classes:
        raise BadWeightsError(
            f"{rows.place} has logits of {rows.logits.shape[1]} classes and the ID images have {classes}; give logits "
            "of one model"
        )


def _sum_to_one(logits: np.ndarray) -> bool:
    fits = logits.shape[1] > 1 and logits.min() >= 0 and logits.max() <= 1
    return bool(fits and np.abs(logits.sum(1) - 1).max() < PROBABILITIES)


def _order(rows: Rows, images: Any, what: str) -> np.ndarray:
    """Which row is of which image: by name where the file has names, else by place."""
    n = len(rows.logits)
    if rows.ids is not None and images.values is None:
        places = {name: i for i, name in enumerate(rows.ids)}
        ends: dict[str, list[int]] = {}
        for name, i in places.items():
            ends.setdefault(PurePath(name).name, []).append(i)
        found = []
        for name in images.names:
            same = ends.get(PurePath(name).name, [])
            found.append(places.get(name, same[0] if len(same) == 1 else None))
        missing = [name for name, place in zip(images.names, found, strict=True) if place is None]
        if missing:
            raise QuantlensError(
                f"{rows.place} has no row of {len(missing)} of the {len(images)} images of {what} ({images.source}), "
                f"first of {missing[0]}; its first name is {rows.ids[0]}"
            )
        return np.array(found)
    if n != len(images):
        raise QuantlensError(
            f"{rows.place} has {n} rows and {what} ({images.source}) {len(images)} images; give the rows names (`ids`, "
            "or the column path) or the same images"
        )
    return np.arange(n)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[dict[str, Rows], tuple[Tensor, Tensor] | None]:
    """(rows by image set, the classifier's weight [K, D] and bias [K] or None) of a file. Nothing in it is unpickled.

    Raises BadWeightsError, saying what is wrong, for a file that is missing, damaged, or of other shapes.
    """
    if not path.is_file():
        raise BadWeightsError(f"there is no file of logits {path}")
    if path.suffix == ".csv":
        return {ID: _of_csv(path)}, None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadWeightsError(
            f"{path} is no file of logits ({first_line(error)}); write it with numpy.savez, plain arrays only"
        ) from None
    return _of_npz(path, arrays)


def is_logits(path: Path) -> bool:
    """Whether a .npz has logits and no per-image outputs of `quantlens evaluate --keep`, or a file is a .csv."""
    if path.suffix == ".csv":
        return path.is_file()
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
    return "logits.npy" in names and "about.npy" not in names


def _of_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Rows], tuple[Tensor, Tensor] | None]:
    parts: dict[str, dict[str, np.ndarray]] = {}
    layer: dict[str, np.ndarray] = {}
    for key, values in arrays.items():
        match = re.fullmatch(r"(?:(fit)/|ood/(.+)/)?(logits|labels|features|ids|paths)", key)
        if match:
            what = FIT if match[1] else f"{OOD}{match[2]}" if match[2] else ID
            parts.setdefault(what, {})["ids" if match[3] == "paths" else match[3]] = values
        elif key in ("classifier/weight", "classifier/bias"):
            layer[key.partition("/")[2]] = values
        else:
            raise BadWeightsError(
                f"{path} has an array {key!r}; the names are logits, labels, features, ids, the same after ood/NAME/ "
                "and fit/, and classifier/weight and /bias (docs/foreign.md)"
            )
    found = {what: _rows(path, what, part) for what, part in parts.items()}
    return found, _layer(path, layer, found)


def _rows(path: Path, what: str, part: Mapping[str, np.ndarray]) -> Rows:
    place = str(path) if what == ID else f"{path} ({what})"
    bare = "logits" not in part and "features" in part
    part = {"logits": part["features"], **{k: v for k, v in part.items() if k != "features"}} if bare else part
    logits = part.get("logits")
    if logits is None:
        raise BadWeightsError(f"{place} has {', '.join(part)} and no logits")
    for name in ("logits", "features"):
        values = part.get(name)
        if values is not None and (values.ndim != 2 or values.dtype.kind not in "fiu" or 0 in values.shape):
            raise BadWeightsError(
                f"{place}: {name} are {values.dtype} {list(values.shape)}; give numbers [images, "
                f"{'classes' if name == 'logits' else 'dimensions'}]"
            )
    n = len(logits)
    for name in ("labels", "features", "ids"):
        values = part.get(name)
        flat = name == "ids" or (name == "labels" and (values is None or values.shape != logits.shape))
        if values is not None and (values.ndim == 0 or len(values) != n or (flat and values.ndim != 1)):
            raise BadWeightsError(f"{place}: {name} have shape {list(values.shape)} and there are logits of {n} images")
    labels, features, ids = part.get("labels"), part.get("features"), part.get("ids")
    if labels is not None and (labels.dtype.kind not in "iuf" or not np.array_equal(labels, np.floor(labels))):
        raise BadWeightsError(f"{place}: labels are {labels.dtype}; give the number of each image's class, from 0")
    names = None if ids is None else [str(name) for name in ids.tolist()]
    if names is not None and len(set(names)) < n:
        raise BadWeightsError(f"{place} has two rows of {max(names, key=names.count)}; give each image one")
    return Rows(
        place,
        logits.astype(np.float32),
        None if labels is None else labels.astype(np.int64),
        None if features is None else features.astype(np.float32),
        names,
        bare,
    )


def _layer(path: Path, layer: Mapping[str, np.ndarray], parts: Mapping[str, Rows]) -> tuple[Tensor, Tensor] | None:
    if not layer:
        return None
    features = parts[ID].features if ID in parts else None
    width = None if features is None else features.shape[1]
    classes = parts[ID].logits.shape[1] if ID in parts else None
    weight, bias = layer.get("weight"), layer.get("bias")
    if weight is None or bias is None or weight.shape != (classes, width) or bias.shape != (classes,):
        raise BadWeightsError(
            f"{path}: classifier/weight must be [classes, dimensions of the features], and bias [classes]"
        )
    return torch.from_numpy(weight.astype(np.float32)), torch.from_numpy(bias.astype(np.float32))


def _of_csv(path: Path) -> Rows:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            head = [name.strip() for name in next(lines, [])]
            at = _columns(path, head)
            table = list(_csv_rows(path, head, lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadWeightsError(f"{path} cannot be read as CSV: {error}") from None
    if not table:
        raise BadWeightsError(f"{path} has no row after its head")

    def numbers(places: list[int]) -> np.ndarray:
        values = np.empty((len(table), len(places)), np.float32)
        for i, row in enumerate(table):
            try:
                values[i] = [float(row[place]) for place in places]
            except ValueError as error:
                raise BadWeightsError(f"{path}, row {i + 1}: {error}") from None
        return values

    part: dict[str, np.ndarray] = {"logits": numbers(at["logit"])}
    if at["feature"]:
        part["features"] = numbers(at["feature"])
    if at["label"]:
        part["labels"] = numbers(at["label"])[:, 0].astype(np.float64)
    if at["path"]:
        part["ids"] = np.array([row[at["path"][0]] for row in table])
    return _rows(path, ID, part)


def _csv_rows(path: Path, head: list[str], lines: Any) -> Iterator[list[str]]:
    for i, row in enumerate(lines):
        if len(row) != len(head):
            if not row:
                continue
            raise BadWeightsError(f"{path}, row {i + 1} has {len(row)} columns and the head {len(head)}")
        yield row


def _columns(path: Path, head: list[str]) -> dict[str, list[int]]:
    """Where the columns stand; those of logits and features in the order of their numbers."""
    at: dict[str, list[int]] = {"path": [], "label": [], "logit": [], "feature": []}
    numbered: dict[str, dict[int, int]] = {"logit": {}, "feature": {}}
    for place, name in enumerate(head):
        match = re.fullmatch(r"(logit|feature)_(\d+)", name)
        if match:
            numbered[match[1]][int(match[2])] = place
        elif name in ("path", "label"):
            at[name].append(place)
        else:
            raise BadWeightsError(
                f"{path} has a column {name!r}; the columns are {', '.join(COLUMNS)} (docs/foreign.md)"
            )
    for kind, places in numbered.items():
        if sorted(places) != list(range(len(places))):
            raise BadWeightsError(f"{path}: the columns {kind}_0 to {kind}_{len(places) - 1} are not all there")
        at[kind] = [places[i] for i in range(len(places))]
    if not at["logit"]:
        raise BadWeightsError(f"{path} has no column logit_0; the columns are {', '.join(COLUMNS)} (docs/foreign.md)")
    return at
