"""The study file: models x methods x bits x seeds, and the images they are measured on (docs/study.md has every key).

A path is relative to the study file; `${NAME}` and `${NAME:-default}` in paths are taken from the environment.
Every mistake a person can make in the file raises `QuantlensError` with one sentence.
"""

import os
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from quantlens._moved import ARGUMENTS, arguments_apart
from quantlens.data.sources import MADE_IMAGES, NO_IMAGES, with_sample
from quantlens.errors import QuantlensError
from quantlens.metrics.operating import KEEP, Promise
from quantlens.yaml_files import Source, Strict, checked, read_yaml, whole_path

# ---- paths, sources and precisions -----------------------------------------------------------------------------------


def _weights(text: str, info: ValidationInfo) -> str:
    return text if text in ("pretrained", "random") else whole_path(text, info)


def _plugin(text: str, info: ValidationInfo) -> str:
    return whole_path(text, info) if "/" in text or text.endswith(".py") else text


def _not_sampled(count: str, source: str) -> str:
    """Refuse a source that draws a sample, which the key `count` is for; "none" is that of made images."""
    if re.search(r"[?&](n|seed)=", source):
        raise ValueError(f"must not draw a sample itself: write the number of images as `{count}`")
    return MADE_IMAGES if source == NO_IMAGES else source


def _bits(text: str) -> str:
    """A precision in its one spelling: `W4A8`, `FP32`, `MP6` for mixed precision."""
    from quantlens.allocation import is_target, parse_target
    from quantlens.qmodel.plan import Bits

    try:
        return f"MP{parse_target(text)}" if is_target(text) else str(Bits.parse(text))
    except QuantlensError as error:
        raise ValueError(str(error)) from None


Precision = Annotated[str, AfterValidator(_bits)]


# ---- the file --------------------------------------------------------------------------------------------------------


class _Strict(Strict):
    """Has no keys but those declared. A bare string stands for {`_short`: string}, and a label is the name at first."""

    _short: ClassVar[str] = "name"

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, value: Any) -> Any:
        value = {cls._short: value} if isinstance(value, str) else value
        if "label" in cls.model_fields and isinstance(value, dict):
            return {"label": value.get("name", ""), **value}
        return value


class ForeignSpec(_Strict):
    """A file of another tool that was made from the model (.onnx, .xml), or of its logits (.npz, .csv): one more cell.
    Its label stands where methods' do (by default its name); bits: where they are known."""

    _short = "file"
    file: Annotated[str, AfterValidator(whole_path)]
    label: str = ""
    bits: Precision | None = None

    @property
    def title(self) -> str:
        return self.label or Path(self.file).stem

    @field_validator("file")
    @classmethod
    def _readable(cls, value: str) -> str:
        if Path(value).suffix not in (".onnx", ".xml", ".npz", ".csv"):
            raise ValueError(f"{value} is none of .onnx, .xml (OpenVINO), .npz and .csv (logits)")
        return value


class ModelSpec(_Strict):
    """One model: a name that `load_model` takes, its weights ("pretrained", "random", a file, or nothing for the
    default of the name), a label for tables, further keyword arguments of `load_model`, and files that other tools
    made from it."""

    name: str = Field(min_length=1)
    weights: Annotated[str, AfterValidator(_weights)] | None = None
    label: str = ""
    options: dict[str, Any] = Field(default={})
    foreign: tuple[ForeignSpec, ...] = ()


class MethodSpec(_Strict):
    """One method with its options, what every method takes (as `quantize` does; None: the method's default), and a
    label for tables."""

    name: str = Field(min_length=1)
    options: dict[str, Any] = Field(default={})
    label: str = ""
    patch_bits: int | None = None
    head_bits: int | None = None
    outlier_channels: Literal["keep", "split"] | None = None
    image: Literal["range", "pixels"] | None = None
    target: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _arguments_apart(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("options"), dict):
            return value
        shared, own = arguments_apart(value["options"], lambda name: f"`{name}` beside `options`")
        return {**shared, **value, "options": own}

    def settings(self) -> dict[str, Any]:
        """What a method is called with."""
        given = {name: getattr(self, name) for name in ARGUMENTS}
        return {**self.options, **{name: value for name, value in given.items() if value is not None}}


class CalibrationSpec(_Strict):
    """Where calibration images come from (none: they are made), and how many of them each seed draws."""

    _short = "source"
    source: Annotated[Source, AfterValidator(partial(_not_sampled, "n"))]
    n: int = Field(default=32, ge=1)

    def drawn(self, seed: int) -> str:
        """The source of the images that this seed draws."""
        return with_sample(self.source, self.n, seed)


class OodSpec(_Strict):
    """One out-of-distribution set; near sets are averaged apart from far ones. A set that does not say its group is
    far, but for the embedded sets and those that OpenOOD names (`quantlens sources`)."""

    _short = "source"
    source: Source
    group: Literal["far", "near"] | None = None


class AttentionSpec(_Strict):
    """What a study looks at through the attention lens: `images` of every set, evenly spaced, are measured, `show` of
    them are kept with their maps."""

    images: int = Field(default=64, ge=1)
    show: int = Field(default=4, ge=0)


class InspectSpec(_Strict):
    """Which layer hurts (:func:`quantlens.sensitivity.inspect`), found once per model: every site and block alone,
    quantized by `method` at `bits`, on `images` that `seed` draws from `source` (by default that of `calibration`)."""

    bits: Precision = "W8A8"
    images: int = Field(default=16, ge=1)
    method: MethodSpec = MethodSpec(name="minmax")
    seed: int = Field(default=0, ge=0)
    source: Annotated[Source, AfterValidator(partial(_not_sampled, "images"))] | None = None

    @field_validator("bits")
    @classmethod
    def _widths(cls, value: str) -> str:
        if value == "FP32" or value.startswith("MP"):
            raise ValueError(f"{value} is no pair of widths; give bits such as W8A8, W4A4 or MXFP4")
        return value


class OperatingSpec(_Strict):
    """What thresholds are set to on FP32 (`metrics.operating.Promise`): a confidence cut by coverage or by selective
    accuracy, and the share of ID images that an OOD threshold keeps. No cell depends on it."""

    coverage: float | None = None
    accuracy: float | None = None
    keep: float = KEEP

    @model_validator(mode="after")
    def _promises(self) -> "OperatingSpec":
        try:
            Promise(**self.model_dump())
        except QuantlensError as error:
            raise ValueError(str(error)) from None
        return self


class ResourcesSpec(_Strict):
    """What each worker asks a Ray cluster for: processors (its threads) and GPUs, a part of one (0.25: four workers
    share it) or whole ones. None: see docs/scaling.md. No metric depends on it."""

    cpu: int | None = Field(default=None, ge=1)
    gpu: float | None = Field(default=None, ge=0)

    @field_validator("gpu")
    @classmethod
    def _whole_above_one(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("a worker has a part of one GPU, or whole ones: 0.25, 0.5, 1, 2")
        return value


class StudyConfig(_Strict):
    """A whole study. Lists run in the order given."""

    name: str = "study"
    models: tuple[ModelSpec, ...] = Field(min_length=1)
    methods: tuple[MethodSpec, ...] = ()
    bits: tuple[Precision, ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0, le=2**63 - 1)], ...] = Field(default=(0,), min_length=1)
    calibration: CalibrationSpec | None = None
    id: Source
    ood: dict[str, OodSpec] = Field(default={})
    shift: dict[str, Source | tuple[str, ...]] = Field(default={})
    """Shifted ID sets by name; "corrupt": which corruptions of the ID images (`evaluation.shift.corruptions`)."""
    fit: Source | None = None
    scores: tuple[str, ...] | None = None
    attention: AttentionSpec | None = None
    inspect: InspectSpec | None = None
    plugins: tuple[Annotated[str, AfterValidator(_plugin)], ...] = ()
    resources: ResourcesSpec = ResourcesSpec()
    device: str = "auto"
    batch_size: int = Field(default=64, ge=1)
    skip_bad: bool = False
    cache: bool | Annotated[str, AfterValidator(whole_path)] = True
    outputs: bool | Literal["scores"] = True
    operating: OperatingSpec = OperatingSpec()

    @field_validator("attention", "inspect", mode="before")
    @classmethod
    def _asked_for(cls, value: Any) -> Any:
        return ({} if value else None) if isinstance(value, bool) else value

    @field_validator("shift", mode="before")
    @classmethod
    def _corruptions(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        wrong = next((name for name, one in value.items() if name != "corrupt" and not isinstance(one, str)), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is {value[wrong]!r}; give the SOURCE of its images")
        asked = value.get("corrupt", ())
        return {**value, "corrupt": [asked]} if isinstance(asked, str) else value  # a list, which no SOURCE is

    @field_validator("bits", "seeds")
    @classmethod
    def _each_once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _whole(self) -> "StudyConfig":
        called = [("models", [s.label for s in self.models]), ("methods", [s.label for s in self.methods])]
        called += [("methods or files", [*called[1][1], *(f.title for f in s.foreign)]) for s in self.models]
        for what, labels in called:
            twice = next((label for label in labels if labels.count(label) > 1), None)
            if twice is not None:
                raise ValueError(f"two {what} are called {twice!r}: give each of them its own `label`")
        if any(bits != "FP32" for bits in self.bits):
            if not self.methods:
                raise ValueError("`methods` is missing: name at least one method for the quantized precisions")
            if self.calibration is None:
                raise ValueError("`calibration` is missing: name a source of images, or `none`, and some are made")
        if self.inspect is not None and self.inspect.source is None and self.calibration is None:
            raise ValueError("`inspect` has no images: give it a `source`, or the study `calibration`")
        return self

    def inspected(self) -> CalibrationSpec:
        """Where the images of `inspect` come from, and how many of them; the study must have it."""
        assert self.inspect is not None
        source = self.inspect.source or (self.calibration.source if self.calibration else "")
        return CalibrationSpec(source=source, n=self.inspect.images)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it is kept in the store."""
        return self.model_dump(mode="json")


def load_config(path: str | os.PathLike[str]) -> StudyConfig:
    """Read a study file (YAML, safe tags only)."""
    path = Path(path)
    where = f"study file {path}"
    data = read_yaml(path, where, "see examples/ for files to start from")
    return parse_config(data, base=path.parent, where=where, name=path.stem)


def parse_config(data: Any, *, base: Path | None = None, where: str = "the study", name: str = "study") -> StudyConfig:
    """A checked study from plain data; paths are resolved against `base` (None: the working directory)."""
    if not isinstance(data, dict):
        raise QuantlensError(f"{where} must hold keys such as `models:` and `bits:`, not {type(data).__name__}")
    return checked(StudyConfig, {"name": name, **data}, base=base or Path(), where=where)
