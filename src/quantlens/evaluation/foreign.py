"""Models that quantlens did not make, measured as they are: nothing is captured, nothing is changed.

What they share is here: which of their outputs is read, how their images are prepared, and what is said of them.
`foreign_files` runs ONNX and OpenVINO files, `foreign_modules` modules and callables.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantlens.data import Preprocess
from quantlens.errors import QuantlensError, QuantlensWarning, UnknownNameError, UnsupportedError, first_line
from quantlens.evaluation.result import Result
from quantlens.models.detection import scores_and_boxes
from quantlens.qmodel import Bits, Outputs

EMBEDDINGS = ("image_embeds", "pooler_output", "features", "image_features", "embedding", "embeddings", "feature")
"""Names of outputs that are features; the first two are features of a model without logits."""
DEFAULT_SIZE = (3, 224, 224)
ALONE = 1e-3
"""Relative change of an image's logits beside other images from which on each is run alone."""
PROBABILITIES = 0.05
"""How far from 1 the sums of outputs may be that are taken for probabilities (8-bit ones do not add up)."""


def open_foreign(
    model: Any,
    *,
    reference: Any = None,
    preprocess: Preprocess | Mapping[str, Any] | None = None,
    output: str | None = None,
    features: str | None = None,
    task: str | None = None,
    bits: str | None = None,
    name: str | None = None,
) -> Any:
    """A model that quantlens did not make, ready for `evaluate`, `compare` and studies.

    model: an ONNX or OpenVINO file (.onnx, .xml), a file of logits (.npz, .csv), an ``nn.Module`` (quantized by torchao
    or anything else), a program of torch.export, or
    a callable, images float32 [B, 3, H, W] -> logits [B, K] (tensors or arrays). reference: the float model it came
    from, or its Result; its preprocessing is taken unless `preprocess` says another. output, features: names of the
    outputs to read (in a file also of tensors inside the graph); by default ``logits``, else the first [B, K], and a
    second [B, D]. task: as of `load_model`, by default the reference's. bits: ``W8A8``, where it is known.

    Raises BadWeightsError for a file that cannot be read, UnsupportedError for inputs or outputs that do not fit.
    """
    given: dict[str, Any] = {"reference": reference, "preprocess": preprocess, "task": task, "bits": bits, "name": name}
    if isinstance(model, str | Path):
        if Path(model).suffix in (".npz", ".csv"):
            from quantlens.evaluation.logits_files import LogitsFile

            return LogitsFile(model, **given)
        from quantlens.evaluation.foreign_files import ForeignFile

        return ForeignFile(model, output=output, features=features, **given)
    from quantlens.evaluation.foreign_modules import ForeignModule
    from quantlens.models import unwrapped

    model = unwrapped(model) if isinstance(model, torch.export.ExportedProgram) else model
    return ForeignModule(model, output=output, features=features, **given)


class About:
    """What every foreign model says of itself, in the words of a quantized one. foreign: what else a result keeps."""

    seed, calibration, guard = 0, None, None
    num_parameters: int | None = None
    size_mb: float | None = None
    device: Any = torch.device("cpu")

    def __init__(
        self,
        kind: str,
        own_name: str,
        *,
        reference: Any = None,
        preprocess: Any = None,
        task: str | None = None,
        bits: str | None = None,
        name: str | None = None,
    ) -> None:
        source = None if reference is False else reference
        called = getattr(source, "model" if isinstance(source, Result) else "name", None)
        self.reference = None if isinstance(source, Result) else source
        self.method, self.bits = f"foreign:{kind}", None if bits is None else str(Bits.parse(bits))
        self.name = str(name or called or own_name)
        self.checkpoint_sha256 = getattr(source, "checkpoint_sha256", None)
        self.num_parameters = getattr(source, "num_parameters", None)
        self.class_names = getattr(source, "class_names", None)
        self.options: dict[str, Any] = {}
        self.task, self._expected = task or getattr(source, "task", None), _classes(source)
        self.detection_head = getattr(source, "detection_head", None)
        theirs = getattr(source, "preprocess", None)
        prepared = theirs if preprocess is None else preprocess
        self.preprocess = Preprocess.from_dict(prepared) if isinstance(prepared, Mapping) else prepared
        said = None if theirs is None else f"the float model {called}"
        self.foreign: dict[str, Any] = {"kind": kind, "preprocess_from": said if preprocess is None else "given"}

    @property
    def size_ratio(self) -> float | None:
        """Size over that of the float model's parameters."""
        known = self.size_mb is not None and self.num_parameters
        return self.size_mb * 1e6 / (4 * self.num_parameters) if known else None  # type: ignore[operator]

    def classifier(self) -> tuple[Tensor, Tensor] | None:
        return None

    def to(self, *_: Any, **__: Any) -> Any:
        return self


def _classes(reference: Any) -> int | None:
    """How many classes the float model has; None where it does not say (a Model before it is captured)."""
    if isinstance(reference, Result):
        return reference.id.get("num_classes")
    count = getattr(getattr(reference, "module", reference), "num_classes", None)
    return count if isinstance(count, int) and count > 0 else None


class Read(NamedTuple):
    """Which outputs are read: the primary one, and features (None: there are none), by name; and the task."""

    output: str
    features: str | None
    task: str


class Foreign(About):
    """A foreign model that runs. A subclass gives `named`: images -> its outputs by name."""

    fixed_batch: int | None = None
    """images that it takes at once, no more and no less; None: any number"""
    images_together: int | None = None

    def __init__(self, kind: str, own_name: str, *, output: str | None, features: str | None, **given: Any) -> None:
        super().__init__(kind, own_name, **given)
        self._wanted, self._columns = (output, features), 0
        self._read: Read | None = None
        self._probabilities, self._looked = False, False

    def named(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        self.learn()
        return self._columns

    def learn(self, size: Sequence[int] | None = None) -> None:
        """Find out what the model gives, on two grey images of a size [3, H, W] (by default what it is known to take).
        Done once."""
        if self._read is not None:
            return
        shape = tuple(size or (self.preprocess.input_size if self.preprocess else DEFAULT_SIZE))
        found, count = self._tried(torch.zeros(2, *shape))
        if self.task == "detect" or (self.task is None and "pred_boxes" in found):
            self._learn_detector(found)
            return
        self._read = chosen(found, count, *self._wanted, task=self.task, classes=self._expected, name=self.name)
        self.task = self._read.task
        primary = flat(found[self._read.output])
        assert primary is not None
        self._columns = primary.shape[1]
        if self._expected not in (None, self._columns) and self.task not in ("features", "zero-shot"):
            raise UnsupportedError(
                f"{self.name} ({self.method}) gives {self._columns} classes and the float model has {self._expected}; "
                "give the float model that it came from, or the name of another output"
            )
        self._probabilities = self.task == "classify" and _sum_to_one(primary)
        self.foreign |= {"output": self._read.output, "features": self._read.features, "task": self.task}
        if self._probabilities:
            self.foreign["output"] += " (probabilities: their logarithm is taken)"
            warnings.warn(
                f"{self.name} ({self.method}) gives probabilities, not logits: their logarithm is measured, of which "
                "maxlogit is MSP and energy is constant",
                QuantlensWarning,
                stacklevel=2,
            )

    def _learn_detector(self, found: Mapping[str, Tensor]) -> None:
        if self.detection_head is None or _scores_and_boxes(found) is None:
            raise UnsupportedError(
                f"{self.name} ({self.method}) is measured as a detector: it must give logits and pred_boxes, and what "
                "they mean is taken from the float model that it came from: name it (reference=, --reference), or load "
                "it with quantlens.load_model where it is the float model"
            )
        self.task, self._columns = "detect", len(self.detection_head.labels)
        self._read = Read("logits", None, self.task)
        self.foreign |= {"task": self.task}

    def _tried(self, images: Tensor) -> tuple[dict[str, Tensor], int]:
        """What it gives for some images, and for how many: as many as it takes, two, else one."""
        counts = [self.fixed_batch] if self.fixed_batch else [2, 1]
        for count in counts:
            try:
                with torch.inference_mode():
                    found = self.named(images[:1].expand(count, -1, -1, -1).contiguous())
            except Exception as error:
                if count == counts[-1]:
                    raise UnsupportedError(
                        f"{self.name} ({self.method}) cannot be run on images {[count, *images.shape[1:]]}: "
                        f"{first_line(error)}"
                    ) from error
            else:
                if count == 1 and not self.fixed_batch:
                    self.fixed_batch = 1
                break
        return found, count

    def outputs(self, images: Tensor) -> Outputs:
        """Logits [B, K] of normalised images (of a model of features: these), and the features [B, D] or None."""
        self.learn(images.shape[1:])
        found = self._of_batch(images)
        if not self._looked and len(images) > 1 and self.images_together != 1:
            self._looked = True
            alone = self._of_batch(images[:1]).logits
            if float((alone - found.logits[:1]).norm()) > ALONE * float(alone.norm()):
                # ranges that are found while it runs are those of all images together
                self.images_together = 1
                self.foreign["images_together"] = 1
                parts = [self._of_batch(one) for one in images.split(1)]
                return _joined(parts)
        return found

    def _of_batch(self, images: Tensor) -> Outputs:
        n, size = len(images), self.fixed_batch or self.images_together or len(images)
        short = -n % size
        if short:
            images = torch.cat([images, images[-1:].expand(short, -1, -1, -1)])
        return _joined([self._of_outputs(self.named(part.contiguous())) for part in images.split(size)], n)

    def _of_outputs(self, found: Mapping[str, Tensor]) -> Outputs:
        assert self._read is not None
        if self._read.task == "detect":
            detected = _scores_and_boxes(found)
            assert detected is not None
            return Outputs(detected[0].float(), None, detected[1].float())
        logits = flat(found[self._read.output])
        assert logits is not None
        logits = logits.float()
        if self._probabilities:
            logits = logits.clamp_min(torch.finfo(torch.float32).tiny).log()
        if self._read.task == "features":
            return Outputs(logits, logits)
        features = None if self._read.features is None else flat(found[self._read.features])
        return Outputs(logits, None if features is None else features.float())


def _joined(parts: Sequence[Outputs], n: int | None = None) -> Outputs:
    """The outputs of several batches as those of one, of the first n images."""
    columns = zip(*((part.logits, part.features, part.boxes) for part in parts), strict=True)
    return Outputs(*(None if column[0] is None else torch.cat(column)[:n] for column in columns))


def _scores_and_boxes(found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Class logits [B, Q, C] and boxes [B, Q, 4] of a detector, by name, or the two first outputs."""
    return scores_and_boxes(found if "pred_boxes" in found else list(found.values()))


# ---- which outputs are read ------------------------------------------------------------------------------------------


def chosen(
    found: Mapping[str, Tensor],
    count: int,
    output: str | None,
    features: str | None,
    *,
    task: str | None,
    classes: int | None,
    name: str,
) -> Read:
    """Which of the outputs of `count` images are read: the named ones; else ``logits``, else [B, classes], else
    ``image_embeds`` or ``pooler_output``, else the first [B, D], else the first token of the first [B, N, D].

    Raises UnsupportedError where none of them is a vector per image.
    """
    for wanted in (output, features):
        if wanted is not None and wanted not in found:
            raise UnknownNameError(f"output of {name}", wanted, found)
    usable = {key: flat(value) for key, value in found.items() if value.ndim and value.shape[0] == count}
    vectors = {key: value for key, value in usable.items() if value is not None and value.is_floating_point()}
    if not vectors or (output is not None and output not in vectors):
        shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in found.items())
        raise UnsupportedError(
            f"{name} gives {shapes or 'no tensor'} for {count} images: quantlens measures logits [B, K] or features "
            "[B, D]; name the output (or tensor) that is one: quantlens.open_foreign(…, output=NAME)"
        )
    plain = [key for key in vectors if found[key].ndim != 3]
    orders = (
        [key for key in vectors if key == "logits"],
        [key for key in plain if classes is not None and vectors[key].shape[1] == classes and task != "features"],
        [key for key in EMBEDDINGS[:2] if key in vectors],
        plain,
        list(vectors),
    )
    primary = output or next(keys[0] for keys in orders if keys)
    width = vectors[primary].shape[1]
    if task is None:
        embeds = primary in EMBEDDINGS or found[primary].ndim == 3
        task = "features" if embeds else "binary" if width == 1 else "classify"
    others = [key for key in plain if key != primary and key not in EMBEDDINGS and vectors[key].shape[1] != width]
    known = [key for key in EMBEDDINGS if key in vectors and key != primary]
    second = features or next(iter([*known, *others]), None)
    return Read(primary, None if task == "features" else second, task)


def flat(value: Tensor) -> Tensor | None:
    """A vector per image [B, D] of an output: of tokens [B, N, D] the first, of a map [B, D, 1, 1] all; else None."""
    if value.ndim == 1:
        return value[:, None]
    if value.ndim == 3:
        return value[:, 0]
    if value.ndim == 4:
        return value.flatten(1) if value.shape[2:] == (1, 1) else None
    return value if value.ndim == 2 else None


def _sum_to_one(rows: Tensor) -> bool:
    rows = rows.float()
    fits = rows.shape[1] > 1 and float(rows.min()) >= 0 and float(rows.max()) <= 1
    return fits and float((rows.sum(1) - 1).abs().max()) < PROBABILITIES


def refuse_unprepared(model: Any, images: Any) -> None:
    """Raise QuantlensError where images of files are to be prepared and nobody says how."""
    if model.preprocess is None and (isinstance(images, str) or hasattr(images, "spec")):
        raise QuantlensError(
            f"{model.name} ({model.method}) does not say how its images are prepared: name the float model it came "
            "from (reference=, --reference), or say it with quantlens.open_foreign(…, preprocess=…); of a float model "
            "of your own, with quantlens.load_model"
        )
