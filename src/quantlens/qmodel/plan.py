"""The plan: everything that makes a quantized model out of the FP32 graph, and who made it; and what is asked for: bit
widths and runtime targets."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.formats import (
    FLOATING,
    Operator,
    Quantizer,
    Uniform,
    affine_parameters,
    floating_bits,
    floating_name,
    symmetric_parameters,
)
from quantlens.graph import Graph
from quantlens.models.detection import DetectionHead

FP32 = "FP32"


@dataclass(frozen=True)
class Provenance:
    """Out of what a quantized model was made, by which method and settings, on which images.

    model: name. checkpoint, checkpoint_sha256: the file of its weights and their digest. bits: ``W4A8``-style; widths:
    by module, with mixed precision. options: all of the method's. calibration: source, n, fingerprint. seconds: the
    method took. detection_head: what the outputs of a detector mean.
    """

    model: str = "model"
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    class_names: list[str] | None = None
    method: str = "custom"
    method_version: int | None = None
    bits: str = ""
    widths: Mapping[str, Any] | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    seconds: float | None = None
    task: str = "classify"
    detection_head: DetectionHead | None = None

    @classmethod
    def of(cls, model: Any, **settings: Any) -> Provenance:
        """Of a loaded model (:class:`quantlens.models.Model`), with what was done to it."""
        return cls(
            model=model.name,
            checkpoint=model.checkpoint,
            checkpoint_sha256=model.checkpoint_sha256,
            class_names=model.class_names,
            task=getattr(model, "task", "classify"),
            detection_head=getattr(model, "detection_head", None),
            **settings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what need not be there is left out where it is None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["detection_head"] = self.detection_head and self.detection_head.to_dict()
        later = ("method_version", "widths", "seconds", "detection_head")
        return {k: v for k, v in values.items() if v is not None or k not in later}


class _ReadOnly(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError(f"plan.info is put together when it is read; write plan.notes[{key!r}]")


@dataclass
class Plan:
    """Everything that makes the quantized model out of the FP32 graph.

    quantizers: edge key -> quantizer (``blocks.3.attn.qkv.weight``, ``blocks.3.attn.probs.output`` …).
    rewrites: exact rewrites done to the graph, as sentences a person can read.
    notes: what else the method tells (JSON-able). operators: site name -> integer operator that computes in the site's
    place (integer LayerNorm, softmax). provenance: see :class:`Provenance`.
    """

    quantizers: dict[str, Quantizer] = field(default_factory=dict)
    rewrites: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    operators: dict[str, Operator] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def info(self) -> dict[str, Any]:
        """Provenance and notes as one dictionary, to be read."""
        return _ReadOnly({**self.provenance.to_dict(), **self.notes})

    def share_weights(self, graph: Graph) -> None:
        """One quantizer for a weight that several layers share: that of the first of them."""
        first: dict[str, Quantizer] = {}
        for key, edge in graph.sites.edges.items():
            if edge.is_weight and key in self.quantizers:
                self.quantizers[key] = first.setdefault(str(edge.value.target), self.quantizers[key])

    @classmethod
    def restore(
        cls,
        quantizers: dict[str, Quantizer],
        rewrites: list[str],
        info: Mapping[str, Any],
        operators: dict[str, Operator],
    ) -> Plan:
        """A plan whose :attr:`info` is ``info``."""
        known = {f.name for f in fields(Provenance)}
        given = {key: value for key, value in info.items() if key in known}
        if given.get("detection_head") is not None:
            given["detection_head"] = DetectionHead.from_dict(given["detection_head"])
        provenance = Provenance(**given)
        notes = {key: value for key, value in info.items() if key not in known}
        return cls(quantizers, rewrites, notes, operators, provenance)


# -- bit widths ----------------------------------------------------------------------------------------------------
# Bit widths as people write them: ``W4A8`` is 4-bit weights and 8-bit activations, ``FP32`` leaves everything in
# float; a mapping gives single modules widths of their own (mixed precision). The name of a floating-point format
# stands for both (``MXFP4``), or in place of a width (``WMXFP4AMXFP8``, ``WMXFP4A8``).


FLOAT = 32


@dataclass(frozen=True)
class Bits:
    """Widths of weights and activations; 32 means float.

    modules: (name, widths) of the modules or sites that differ; the longest name that a site's name starts with (at a
    dot) counts. name: what a mixed-precision setting is called (``MP6``). formats: names of floating-point formats of
    weights and activations, whose elements have these widths; "": integers.

    >>> Bits.parse("w4a8")
    Bits(weights=4, activations=8, modules=(), name='', formats=('', ''))
    >>> str(Bits.parse("WMX-FP4AMX-FP8")), str(Bits.parse("WMXFP4AMXFP4"))
    ('WMXFP4AMXFP8', 'MXFP4')
    >>> str(Bits(4, 8))
    'W4A8'
    >>> str(Bits.parse({"default": "W6A6", "blocks.0.attn": "W8A8"}).of("blocks.0.attn.qkv"))
    'W8A8'
    """

    weights: int
    activations: int
    modules: tuple[tuple[str, Bits], ...] = ()
    name: str = ""
    formats: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        for what, value in (("weights", self.weights), ("activations", self.activations)):
            if value not in (16, FLOAT) and not 2 <= value <= 10:
                raise QuantlensError(
                    f"{value} bits for {what}: choose 2 to 10 or 16, or {FLOAT} for float "
                    f"(for example W4A8, W8A{FLOAT} or FP32)"
                )

    @classmethod
    def parse(cls, text: str | Bits | Mapping[str, Any]) -> Bits:
        """Read ``W<n>A<m>`` (any case), ``FP32``, a floating-point format (of :data:`~quantlens.formats.FLOATING`) or
        two, ``WMXFP4AMXFP8``, or a mapping {"default": "W6A6", module or site name: "W8A8" or a number for both}.
        Raises QuantlensError for anything else."""
        if isinstance(text, Bits):
            return text
        if isinstance(text, Mapping):
            return cls._from_mapping(text)
        clean = str(text).strip().upper()
        if clean in ("FP32", "FLOAT32", "FLOAT", "W32A32"):
            return cls(FLOAT, FLOAT)
        match = re.fullmatch(r"W([^A]+)A([^A]+)", clean)
        sides = [clean, clean] if floating_name(clean) else list(match.groups()) if match else []
        names = [floating_name(side) or "" for side in sides]
        if not sides or not all(name or re.fullmatch(r"\d+", side) for side, name in zip(sides, names, strict=True)):
            raise QuantlensError(
                f"bits {text!r} not understood: write W4A8 (weights 4, activations 8), FP32 or a floating-point format "
                f"({', '.join(FLOATING)}; of each: WMXFP4AMXFP8), or give a mapping from module names to such widths "
                'with a "default"'
            )
        weights, activations = (
            floating_bits(name) if name else int(side) for side, name in zip(sides, names, strict=True)
        )
        return cls(weights, activations, formats=(names[0], names[1]))

    @classmethod
    def _from_mapping(cls, mapping: Mapping[str, Any]) -> Bits:
        def one(value: Any) -> Bits:
            return cls(value, value) if isinstance(value, int) else cls.parse(value)

        if "default" not in mapping:
            raise QuantlensError('mixed precision needs a "default" for the modules that it does not name: W8A8')
        default = one(mapping["default"])
        rest = [(str(k), one(v)) for k, v in mapping.items() if k not in ("default", "name")]
        return replace(default, modules=tuple(sorted(rest)), name=str(mapping.get("name", "")))

    def to_mapping(self) -> dict[str, str]:
        """The inverse of parsing a mapping."""
        named = {"name": self.name} if self.name else {}
        return {**named, "default": str(self._plain), **{k: str(b) for k, b in self.modules}}

    def of(self, site: str) -> Bits:
        """Widths of a site."""
        fitting = [(len(k), b) for k, b in self.modules if site == k or site.startswith(f"{k}.")]
        return max(fitting, key=lambda found: found[0])[1] if fitting else self._plain

    @property
    def _plain(self) -> Bits:
        """Widths of what no module of its own has."""
        return replace(self, modules=(), name="")

    @property
    def floating(self) -> tuple[str, ...]:
        """The floating-point formats, each once."""
        named = (name for one in (self, *(b for _, b in self.modules)) for name in one.formats if name)
        return tuple(dict.fromkeys(named))

    @property
    def is_float(self) -> bool:
        return self.weights == FLOAT and self.activations == FLOAT and all(b.is_float for _, b in self.modules)

    @property
    def is_mixed(self) -> bool:
        return bool(self.modules)

    def __str__(self) -> str:
        if self.is_mixed:
            if self.name:
                return self.name
            text = json.dumps(self.to_mapping(), sort_keys=True)
            return f"MP-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        if self.is_float:
            return "FP32"
        weights, activations = self.formats
        if weights and weights == activations:
            return weights
        return f"W{weights or self.weights}A{activations or self.activations}"


# -- runtime targets -----------------------------------------------------------------------------------------------
# What runtimes compute as integers: a target keeps a quantized model inside it from the start, so that the model that
# is measured is the model that ships, and is fast.
#
# A CPU target quantizes weights and inputs of linear and convolution layers and leaves the rest in float: the
# attention's own products gain nothing at a few hundred tokens, and LayerNorm, softmax, GELU and sums cost both time
# and fidelity.


@dataclass(frozen=True)
class Target:
    """A runtime's integers.

    edges: (site kind, edge) pairs that it computes in integers. weights, activations: widths it has kernels for;
    weights of 5 to 7 bits are stored and multiplied as 8 (with 7 or fewer, a sum of two products fits 16 bits:
    :func:`quantlens.export.exported.saturates`). symmetric_weights, symmetric_activations: whether they must have
    signed codes and zero point 0. signed_activations: whether codes must be signed, with any zero point. half_scales:
    whether scales must be numbers of float16. everything: whether each tensor is quantized, at the only width of
    activations; layers: whether of each layer with a quantized weight input and output are. options: of methods, where
    they have them, that it has by default. untried: the machine that its files have never been run on; "" where they
    have.
    """

    name: str
    summary: str
    edges: frozenset[tuple[str, str]]
    weights: tuple[int, ...] = (8, 7, 6, 5, 4)
    activations: tuple[int, ...] = (8,)
    symmetric_weights: bool = True
    symmetric_activations: bool = False
    signed_activations: bool = False
    half_scales: bool = False
    everything: bool = False
    layers: bool = False
    options: Mapping[str, Any] = field(default_factory=lambda: {"outlier_channels": "split", "image": "pixels"})
    untried: str = ""

    def check_width(self, width: int, *, weight: bool) -> None:
        """Raises UnsupportedError for a width without kernels."""
        allowed = self.weights if weight else self.activations
        if width not in (*allowed, 32):
            what = "weights" if weight else "activations"
            choices = ", ".join(map(str, allowed[:-1])) + " or " * (len(allowed) > 1) + str(allowed[-1])
            example = f"W8A{self.activations[0]}{', W4A8' if 4 in self.weights else ''}"
            raise UnsupportedError(
                f"{self.name} has no kernels for {width}-bit {what}: choose {choices} (for example {example}), or "
                "leave the target out to simulate"
            )

    def conform(self, key: str, quantizer: Quantizer, weight: Tensor | None = None) -> Quantizer:
        """The quantizer inside the target: symmetric where it must be, zero points among the codes.

        weight: the tensor that it quantizes, None for an activation. A symmetric range covers the largest value that
        the quantizer makes of it (not the quantizer's own range, which is 256 times the value where a row has a single
        one). Raises UnsupportedError for a format that is not uniform, or per channel on an activation.
        """
        if type(quantizer) is not Uniform:
            raise UnsupportedError(
                f"{key} has the format {quantizer.kind!r}, which {self.name} has no kernels for; choose a method with "
                "uniform formats (`quantlens methods`), or leave the target out to simulate"
            )
        if weight is not None:
            if not self.symmetric_weights or (quantizer.symmetric and self._holds(quantizer.scale)):
                return quantizer
            values = quantizer(weight).abs()
            rows = values[None] if quantizer.axis is None else values.movedim(quantizer.axis, 0)
            largest = rows.reshape(len(rows), -1).amax(1).reshape(quantizer.scale.shape)
            return self.symmetric(largest, quantizer)
        low = (quantizer.qmin - quantizer.zero_point) * quantizer.scale
        high = (quantizer.qmax - quantizer.zero_point) * quantizer.scale
        if quantizer.axis is not None:
            raise UnsupportedError(
                f"{key} has one scale per {quantizer.granularity}, {self.name} one per tensor; choose another method "
                "or option, or leave the target out to simulate"
            )
        if self.symmetric_activations:
            return self.symmetric(torch.maximum(low.abs(), high.abs()), quantizer)
        inside = quantizer.qmin <= int(quantizer.zero_point) <= quantizer.qmax
        if inside and quantizer.signed == self.signed_activations:
            return quantizer
        if not inside or quantizer.signed:
            scale, zero = affine_parameters(low.clamp_max(0), high.clamp_min(0), quantizer.bits)
            quantizer = Uniform(scale, zero, quantizer.bits, signed=False)
        if not self.signed_activations:
            return quantizer
        return Uniform(quantizer.scale, quantizer.zero_point - quantizer.qmax // 2 - 1, quantizer.bits, signed=True)

    def symmetric(self, largest: Tensor, like: Uniform) -> Uniform:
        """Codes for ±largest ([] or [n]), with the granularity of another quantizer."""
        scale = symmetric_parameters(largest, like.bits)
        if not self._holds(scale):  # the next number above that float16 has, so that the range is covered
            scale = (scale * (1 + 2.0**-11)).clamp_min(2.0**-24).half().float()
        return Uniform(scale, None, like.bits, signed=True, granularity=like.granularity, axis=like.axis)

    def _holds(self, scale: Tensor) -> bool:
        """Whether scales are of the target's type."""
        return not self.half_scales or torch.equal(scale.half().float(), scale)


LINEAR = frozenset({("linear", "input"), ("linear", "weight"), ("conv", "input"), ("conv", "weight")})

OUTPUTS = frozenset({("linear", "output"), ("conv", "output")})

ATTENTION = frozenset({("scores", "q"), ("scores", "k"), ("probs", "output"), ("context", "v")})

TARGETS = {
    t.name: t
    for t in (
        Target("openvino-cpu", "OpenVINO on x86 CPUs: linear and conv layers, int8 weights per output channel", LINEAR),
        Target("onnxruntime-cpu", "ONNX Runtime on x86 CPUs: the same placement", LINEAR),
        Target(
            "tensorrt",
            "TensorRT: linear and conv layers and the attention's products, signed and symmetric",
            LINEAR | ATTENTION,
            weights=(8,),
            symmetric_activations=True,
            half_scales=True,
            options={"outlier_channels": "split", "softmax": "uniform"},
            untried="TensorRT",
        ),
        Target(
            "qnn",
            "NPUs by ONNX Runtime's QNN: every tensor in 16 bits, int8 weights per output channel",
            LINEAR | ATTENTION,
            weights=(8,),
            activations=(16,),
            everything=True,
            options={"patch_bits": 16},
            untried="an NPU",
        ),
        Target(
            "xnnpack",
            "ExecuTorch's XNNPACK: linear and conv layers, their outputs too, signed; int8 weights per output channel",
            LINEAR | OUTPUTS,
            weights=(8,),
            signed_activations=True,
            layers=True,
        ),
    )
}


def target_named(name: str | Target | None) -> Target | None:
    """A target by name. Raises UnknownNameError."""
    if name is None or isinstance(name, Target):
        return name
    if name not in TARGETS:
        raise UnknownNameError("target", name, TARGETS)
    return TARGETS[name]
