"""The study file: models x methods x bits x seeds, and the images they are measured on (docs/study.md has every key).

A path is relative to the study file; `${NAME}` and `${NAME:-default}` in paths are taken from the environment.
Every mistake a person can make in the file raises `QuantlensError` with one sentence.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quantlens._moved import ARGUMENTS, arguments_apart
from quantlens.errors import QuantlensError
from quantlens.studies.study_file import first_problem, read_yaml, resolve_path, resolve_source


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _named(value: Any) -> Any:
    """A bare string stands for {name: string}."""
    return {"name": value} if isinstance(value, str) else value


def _sourced(value: Any) -> Any:
    """A bare string stands for {source: string}."""
    return {"source": value} if isinstance(value, str) else value


def _not_sampled(source: str, count: str) -> str:
    """ValueError for a source that draws a sample, which the key `count` is for."""
    if re.search(r"[?&](n|seed)=", source):
        raise ValueError(f"must not draw a sample itself: write the number of images as `{count}`")
    return source


class ModelSpec(_Strict):
    """One model: a name that `load_model` takes, its weights ("pretrained", "random", a file, or nothing for the
    default of the name), a label for tables, and further keyword arguments of `load_model`."""

    name: str = Field(min_length=1)
    weights: str | None = None
    label: str = ""
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _label_is_name(cls, value: Any) -> Any:
        value = _named(value)
        return {"label": value.get("name", ""), **value} if isinstance(value, dict) else value


class MethodSpec(_Strict):
    """One method with its options, what every method takes (as `quantize` does; None: the method's default), and a
    label for tables."""

    name: str = Field(min_length=1)
    options: dict[str, Any] = {}
    label: str = ""
    patch_bits: int | None = None
    head_bits: int | None = None
    outlier_channels: Literal["keep", "split"] | None = None
    image: Literal["range", "pixels"] | None = None
    target: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _label_is_name(cls, value: Any) -> Any:
        value = _named(value)
        if not isinstance(value, dict):
            return value
        if isinstance(options := value.get("options"), dict):
            shared, own = arguments_apart(options, lambda name: f"`{name}` beside `options`")
            value = {**shared, **value, "options": own}
        return {"label": value.get("name", ""), **value}

    def settings(self) -> dict[str, Any]:
        """What a method is called with."""
        given = {name: getattr(self, name) for name in ARGUMENTS}
        return {**self.options, **{name: value for name, value in given.items() if value is not None}}


class CalibrationSpec(_Strict):
    """Where calibration images come from, and how many of them each seed draws."""

    source: str = Field(min_length=1)
    n: int = Field(default=32, ge=1)

    @field_validator("source")
    @classmethod
    def _no_sample(cls, value: str) -> str:
        return _not_sampled(value, "n")

    def drawn(self, seed: int) -> str:
        """The source of the images that this seed draws."""
        from quantlens.data.sources import with_sample

        return with_sample(self.source, self.n, seed)


class OodSpec(_Strict):
    """One out-of-distribution set; near sets are averaged apart from far ones. A set that does not say its group is
    far, but for the embedded sets, which know theirs."""

    source: str = Field(min_length=1)
    group: Literal["far", "near"] | None = None


class AttentionSpec(_Strict):
    """What a study looks at through the attention lens: `images` of every set, evenly spaced, are measured, `show` of
    them are kept with their maps."""

    images: int = Field(default=64, ge=1)
    show: int = Field(default=4, ge=0)


class InspectSpec(_Strict):
    """Which layer hurts (:func:`quantlens.sensitivity.inspect`), found once per model: every site and block alone,
    quantized by `method` at `bits`, on `images` that `seed` draws from `source` (by default that of `calibration`)."""

    bits: str = "W8A8"
    images: int = Field(default=16, ge=1)
    method: MethodSpec = MethodSpec(name="minmax", label="minmax")
    seed: int = Field(default=0, ge=0)
    source: str | None = None

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        return _named(value)

    @field_validator("bits")
    @classmethod
    def _widths(cls, value: str) -> str:
        bits = parse_bits(value)
        if bits == "FP32" or bits.startswith("MP"):
            raise ValueError(f"{bits} is no pair of widths; give bits such as W8A8 or W4A4")
        return bits

    @field_validator("source")
    @classmethod
    def _no_sample(cls, value: str | None) -> str | None:
        return None if value is None else _not_sampled(value, "images")


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
    bits: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    calibration: CalibrationSpec | None = None
    id: str = Field(min_length=1)
    ood: dict[str, OodSpec] = {}
    fit: str | None = None
    scores: tuple[str, ...] | None = None
    attention: AttentionSpec | None = None
    inspect: InspectSpec | None = None
    plugins: tuple[str, ...] = ()
    resources: ResourcesSpec = ResourcesSpec()
    device: str = "auto"
    batch_size: int = Field(default=64, ge=1)
    skip_bad: bool = False
    cache: bool | str = True
    outputs: bool | Literal["scores"] = True

    @field_validator("models", "methods", mode="before")
    @classmethod
    def _lists_of_names(cls, value: Any) -> Any:
        return [_named(v) for v in value] if isinstance(value, list | tuple) else value

    @field_validator("calibration", mode="before")
    @classmethod
    def _calibration_source(cls, value: Any) -> Any:
        return _sourced(value)

    @field_validator("ood", mode="before")
    @classmethod
    def _ood_sources(cls, value: Any) -> Any:
        return {k: _sourced(v) for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("attention", "inspect", mode="before")
    @classmethod
    def _asked_for(cls, value: Any) -> Any:
        return ({} if value else None) if isinstance(value, bool) else value

    @field_validator("bits")
    @classmethod
    def _bits_exist(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(parse_bits(bits) for bits in value))

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(seed < 0 for seed in value):
            raise ValueError("a seed is a whole number of at least 0")
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _whole(self) -> StudyConfig:
        for what, specs in (("models", self.models), ("methods", self.methods)):
            labels = [spec.label for spec in specs]
            twice = next((label for label in labels if labels.count(label) > 1), None)
            if twice is not None:
                raise ValueError(f"two {what} are called {twice!r}: give each of them its own `label`")
        if any(bits != "FP32" for bits in self.bits):
            if not self.methods:
                raise ValueError("`methods` is missing: name at least one method for the quantized precisions")
            if self.calibration is None:
                raise ValueError("`calibration` is missing: name the source of the calibration images")
        if self.inspect is not None and self.inspect.source is None and self.calibration is None:
            raise ValueError("`inspect` has no images: give it a `source`, or the study `calibration`")
        return self

    def inspected(self) -> str:
        """The source of the images that `inspect` draws; the study must have it."""
        from quantlens.data.sources import with_sample

        assert self.inspect is not None
        source = self.inspect.source or (self.calibration.source if self.calibration else "")
        return with_sample(source, self.inspect.images, self.inspect.seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it is kept in the store."""
        return self.model_dump(mode="json")


def parse_bits(text: str) -> str:
    """A precision in its one spelling (`W4A8`, `FP32`, `MP6` for mixed precision); ValueError when it is none."""
    from quantlens.allocation import is_target, parse_target
    from quantlens.qmodel.bits import Bits

    try:
        return f"MP{parse_target(text)}" if is_target(text) else str(Bits.parse(text))
    except QuantlensError as error:
        raise ValueError(str(error)) from None


def load_config(path: str | os.PathLike[str]) -> StudyConfig:
    """Read a study file (YAML, safe tags only)."""
    path = Path(path)
    where = f"study file {path}"
    data = read_yaml(path, where)
    return parse_config(data, base=path.parent, where=where, name=path.stem)


def parse_config(data: Any, *, base: Path | None = None, where: str = "the study", name: str = "study") -> StudyConfig:
    """A checked study from plain data; paths are resolved against `base` (None: the working directory)."""
    if not isinstance(data, dict):
        raise QuantlensError(f"{where} must hold keys such as `models:` and `bits:`, not {type(data).__name__}")
    try:
        config = StudyConfig.model_validate({"name": name, **data})
    except ValidationError as error:
        raise QuantlensError(f"{where}: {first_problem(error, StudyConfig)}") from None
    return _resolved(config, Path.cwd() if base is None else base.resolve(), where)


def _resolved(config: StudyConfig, base: Path, where: str) -> StudyConfig:
    def weights(model: ModelSpec) -> ModelSpec:
        if model.weights in (None, "pretrained", "random"):
            return model
        assert model.weights is not None
        return model.model_copy(update={"weights": resolve_path(model.weights, base, where)})

    update: dict[str, Any] = {
        "models": tuple(weights(m) for m in config.models),
        "plugins": tuple(resolve_path(p, base, where) if "/" in p or p.endswith(".py") else p for p in config.plugins),
        "id": resolve_source(config.id, base, where),
        "ood": {
            name: spec.model_copy(update={"source": resolve_source(spec.source, base, where)})
            for name, spec in config.ood.items()
        },
    }
    if config.calibration is not None:
        source = resolve_source(config.calibration.source, base, where)
        update["calibration"] = config.calibration.model_copy(update={"source": source})
    if config.inspect is not None and config.inspect.source is not None:
        source = resolve_source(config.inspect.source, base, where)
        update["inspect"] = config.inspect.model_copy(update={"source": source})
    if config.fit is not None:
        update["fit"] = resolve_source(config.fit, base, where)
    if isinstance(config.cache, str):
        update["cache"] = resolve_path(config.cache, base, where)
    return config.model_copy(update=update)
