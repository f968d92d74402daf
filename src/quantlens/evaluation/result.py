"""What an evaluation found: a dataclass, plain data that is valid JSON, and one flat row of numbers by path."""

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.evaluation.outputs import Outputs
from quantlens.files import write_whole
from quantlens.metrics import change, metric_of, metrics_of, names_of

NOT_STORED = frozenset({"extra", "outputs"})
"""Fields of a Result that are no keys of its dictionary."""
OF_SHIFT = ("shift", "shift_mean", "full_spectrum", "full_spectrum_mean")
"""Fields that are keys of its dictionary where shifted images were measured."""
CORRUPT = "corrupt"
"""The key of `shift` that stands for corruptions of the ID images; every other one names a set."""
CORRUPTED = "corruptions"
"""The part of `shift_mean` that is over all corruptions."""
COMPUTED = frozenset({"change", "delta", "detection"})
"""Keys that are computed and never read: `delta` had the opposite sign (FP32 - quantized) in earlier releases."""


@dataclass
class Result:
    """Everything measured on one model; all rates are fractions. `to_dict()` is the stable form (see the README).

    `fp32` holds the metrics of the FP32 model on the same images; `change` is computed from them.
    """

    model: str
    checkpoint_sha256: str | None
    method: str
    bits: str | None
    """None where nobody knows: of a foreign model"""
    seed: int
    size_mb: float | None
    size_ratio: float | None
    num_parameters: int | None
    options: dict[str, Any]
    calibration: dict[str, Any] | None
    preprocess: dict[str, Any] | None
    environment: dict[str, Any]
    id: dict[str, Any]
    fit: dict[str, Any] | None = None
    ood: dict[str, dict[str, Any]] = field(default_factory=dict)
    ood_mean: dict[str, dict[str, Any]] = field(default_factory=dict)
    shift: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The metrics of every shifted in-distribution set, by name."""
    shift_mean: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Their means over corruptions, with `mce` (`evaluation.shift.shift_means`)."""
    full_spectrum: dict[str, dict[str, Any]] = field(default_factory=dict)
    """As `ood`, the shifted images being in-distribution too."""
    full_spectrum_mean: dict[str, dict[str, Any]] = field(default_factory=dict)
    histograms: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores_unavailable: dict[str, str] = field(default_factory=dict)
    task: str = "classify"
    """What the model was measured as, of `metrics.TASKS`."""
    metrics_unavailable: dict[str, str] = field(default_factory=dict)
    text_embeddings: dict[str, Any] | None = None
    """Of the task "zero-shot": how many texts there are, their scale, bias and fingerprint."""
    fp32: dict[str, Any] | None = None
    guard: dict[str, Any] | None = None
    """How often the OOD threshold of an exported file is right (`export.guards.guard_metrics`); None without one."""
    seconds: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of a newer quantlens, kept as they are."""
    outputs: Outputs | None = field(default=None, repr=False, compare=False)
    """What the model gave on every image, where it was asked for; no part of `to_dict()`."""

    @property
    def change(self) -> dict[str, Any] | None:
        """Each metric less the same metric at FP32, as `metrics_only` has them; None without an FP32 model."""
        return None if self.fp32 is None else change(metrics_only(vars(self)), self.fp32)

    @property
    def delta(self) -> dict[str, Any] | None:
        """An earlier name of `change`, with the opposite sign (FP32 - quantized)."""
        warnings.warn(
            "Result.delta is Result.change now, with the opposite sign (quantized - FP32); quantlens 0.4 drops the old "
            "name",
            DeprecationWarning,
            stacklevel=2,
        )
        return None if self.fp32 is None else change(self.fp32, metrics_only(vars(self)))

    @property
    def title(self) -> str:
        """ "digits-vit minmax W4A4, seed 0"."""
        if self.method.startswith("foreign:"):
            return " ".join(filter(None, (self.model, self.method, self.bits)))
        what = f"{self.method} {self.bits}, seed {self.seed}" if self.method != "fp32" else self.bits
        return f"{self.model} {what}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data that is valid JSON: numbers are Python's, and a metric that is not finite is null."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in NOT_STORED]
        names = [name for name in names if name not in OF_SHIFT or getattr(self, name)]
        told = {**self.extra, **{name: getattr(self, name) for name in names}, "change": self.change}
        if self.task == "detect":
            told["detection"] = {name: self.id.get(name) for name in ("n", *metrics_of("detect"))}
        return plain(told)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Result":
        """The inverse of `to_dict`. Raises QuantlensError when a key that every result has is missing."""
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in NOT_STORED}
        every = [name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
        missing = [name for name in every if name not in data]
        if missing:
            raise QuantlensError(f"this is no result of quantlens: it lacks {', '.join(sorted(missing))}")
        extra = {k: v for k, v in data.items() if k not in fields and k not in COMPUTED}
        return cls(**{k: v for k, v in data.items() if k in fields}, extra=extra)

    def compare(self, reference: "Result") -> None:
        """Set `fp32` from the FP32 Result on the same images. Raises QuantlensError for one of other
        images, or of a quantized model."""
        check_same_images(reference, self.id, self.ood, self.shift)
        check_same_task(reference, self.task)
        self.take_fp32(metrics_only(vars(reference)))

    def take_fp32(self, metrics: dict[str, Any]) -> None:
        """Set `fp32`, and the mean corruption error as a ratio to the FP32 model's."""
        self.fp32 = metrics
        before = ((metrics.get("shift_mean") or {}).get(CORRUPTED) or {}).get("mce")
        if before and CORRUPTED in self.shift_mean:
            self.shift_mean[CORRUPTED]["relative_mce"] = self.shift_mean[CORRUPTED]["mce"] / before

    def to_pandas(self) -> Any:
        """A pandas DataFrame of one row: what the model is, then every number under its path ("id.top1", …). Raises
        UnsupportedError where pandas is not installed."""
        data = self.to_dict()
        return frame([row(data, data)])

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` as JSON; the file is there whole or not at all."""
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def __str__(self) -> str:
        """What was measured and on what, a metric per line; of OOD detection AUPR-out by the first score, and what
        the threshold of an exported file keeps and flags."""
        known = [f"id.{name}" for name in metrics_of(self.task, fitted=True)]
        ends = (f".{next(iter(self.histograms), '')}.aupr_out", ".kept", ".flagged")
        lines = [
            f"{title_of(path)}: {metric_of(path).text(value)}"
            for path, value in numbers(self.to_dict())
            if path in known or (path.startswith(("ood.", "guard.")) and path.endswith(ends))
        ]
        return "\n".join([*summary(self), *lines])


def summary(result: Result) -> list[str]:
    """A line that says what the model is, and one that says what the ID images are."""
    size = "" if result.size_mb is None else f", {result.size_mb:.2f} MB"
    ratio = f" ({result.size_ratio:.3f} of FP32)" if result.size_ratio is not None and result.method != "fp32" else ""
    skipped = f", {result.id['skipped']} skipped" if result.id.get("skipped") else ""
    task = "" if result.task == "classify" else f", measured as {result.task}"
    images = f"ID {result.id.get('source')}: {result.id.get('n')} images{skipped}{task}"
    return [f"{result.title}{size}{ratio}", images]


def title_of(path: str) -> str:
    """A metric by its path in a result: "ood_mean.far.msp.auroc" -> "AUROC % ↑, mean far, msp"."""
    heading, parts = metric_of(path).heading, path.split(".")
    if parts[0] in OF_SHIFT[:2]:
        of = ".".join(parts[1:-1])
        return f"{heading}, {of}" if parts[0] == "shift" else f"{heading}, mean {of.replace('_', ' ')}"
    if parts[0] in OF_SHIFT[2:]:
        return title_of(path.replace("full_spectrum", "ood", 1)).replace(", ", ", full spectrum, ", 1)
    if parts[0] == "guard":
        return f"{heading}, {'.'.join(parts[2:-1]) or 'ID'}"
    if parts[0] == "operating":  # operating.same.ood.textures.msp.misses, operating.same.id.msp.false_alarms
        return ", ".join([heading, *parts[3:-1]]) if parts[2] == "id" else title_of(".".join(parts[2:]))
    if parts[0] not in ("ood", "ood_mean"):
        return heading
    return f"{heading}, {'mean ' if parts[0] == 'ood_mean' else ''}{'.'.join(parts[1:-2])}, {parts[-2]}"


def metrics_only(result: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of which the change by quantization is taken: {"id", "ood", "ood_mean"}, and of what there is under
    shift the same keys as in the result; no counts, no tables."""

    def of_shift(part: str) -> dict[str, Any]:
        names = (*metrics_of(result.get("task")), "mce")
        sets = {name: chosen(entry, names) for name, entry in result[part].items()}
        return sets if part in ("shift", "shift_mean") else by_score(part)

    def chosen(entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        return {name: entry[name] for name in names if name in entry}

    def by_score(part: str) -> dict[str, Any]:
        return {
            name: {
                score: chosen(value, names_of("ood")) for score, value in entry.items() if isinstance(value, Mapping)
            }
            for name, entry in (result.get(part) or {}).items()
        }

    return {
        "id": chosen(result.get("id") or {}, metrics_of(result.get("task"), fitted=True)),
        "ood": by_score("ood"),
        "ood_mean": by_score("ood_mean"),
        **{part: of_shift(part) for part in OF_SHIFT if result.get(part)},
    }


def check_same_images(
    reference: Result, id_part: Mapping[str, Any], ood_part: Mapping[str, Any], shift: Mapping[str, Any] | None = None
) -> None:
    """Raise QuantlensError unless a reference Result is of the FP32 model, and of the images that `images.describe`
    describes here: those of the ID set, and of every OOD set and shifted set by name."""
    if reference.method != "fp32":
        raise QuantlensError(
            f"the reference is a result of {reference.method} at {reference.bits}; give the result of the FP32 model"
        )
    if reference.id.get("fingerprint") != id_part.get("fingerprint"):
        raise QuantlensError(
            f"the reference was measured on other ID images ({reference.id.get('source')}) than "
            f"{id_part.get('source')}; measure the FP32 model on the same images"
        )
    others = [("OOD", reference.ood, name, part) for name, part in ood_part.items()]
    others += [("shifted", reference.shift, name, part) for name, part in (shift or {}).items()]
    for kind, known, name, part in others:
        if known.get(name, {}).get("fingerprint") != part.get("fingerprint"):
            raise QuantlensError(
                f"the reference was not measured on the images of {kind} set {name} ({part.get('source')}); measure "
                "the FP32 model on the same images"
            )


def check_same_task(reference: Result, task: str) -> None:
    """Raise QuantlensError unless a reference Result is of the task."""
    if reference.task != task:
        raise QuantlensError(
            f"the reference was measured as {reference.task!r} and this model is as {task!r}; measure both as one task"
        )


def plain(value: Any) -> Any:
    """Nested dicts, lists, strings and finite Python numbers; numpy values are unpacked, NaN becomes None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


# ---- flat rows, for spreadsheets and data frames ---------------------------------------------------------------------

FIRST = ("model", "method", "bits", "seed", "options")
LEFT_OUT = frozenset(
    {"per_class", "per_label", "reliability", "histograms", "attention_examples", "thumbnails", "edges"}
)
"""Parts of a result that are no single numbers."""
NOT_MEASURED = frozenset({"fp32", "environment", "preprocess", "options", "allocation", "text_embeddings"})
"""Parts that are of something else, or settings."""


def numbers(result: Mapping[str, Any]) -> Iterator[tuple[str, float | int]]:
    """(path, number) of everything measured in a result: ("id.top1", 0.98), ("ood.textures.msp.aupr_out", …). Fractions
    as in `to_dict()`. "change.…" is computed from the result and the FP32 metrics it carries, never read."""
    kept = {key: value for key, value in result.items() if key not in COMPUTED}
    yield from _numbers({**kept, "change": change(metrics_only(result), result.get("fp32") or {})}, "")


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float | int]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key not in LEFT_OUT and key not in NOT_MEASURED:
                yield from _numbers(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def row(names: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """What a result is of (FIRST, from `names`; the options as JSON), then its numbers."""
    first = {key: names.get(key) for key in FIRST[:-1]}
    first["options"] = json.dumps(names.get("options") or {}, sort_keys=True)
    return first | {path: value for path, value in numbers(result) if path not in first}


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of rows: what they are of, then their numbers, sorted within each row."""
    return list(dict.fromkeys(key for one in rows for key in (*FIRST, *sorted(set(one) - set(FIRST)))))


def frame(rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> Any:
    """A pandas DataFrame of rows. names: its columns (None: :func:`columns`). Raises UnsupportedError where pandas is
    not installed."""
    try:
        import pandas
    except ImportError as error:
        raise UnsupportedError(
            "a DataFrame needs pandas: run `pip install 'quantlens[pandas]'`, or take to_dict() instead"
        ) from error
    return pandas.DataFrame(list(rows), columns=list(names or columns(rows)))
