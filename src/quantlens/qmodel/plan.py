"""The plan: everything that makes a quantized model out of the FP32 graph, and who made it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from quantlens.errors import QuantlensError
from quantlens.formats.base import Operator, Quantizer

FP32 = "FP32"


@dataclass(frozen=True)
class Provenance:
    """Out of what a quantized model was made, by which method and settings, on which images.

    model: name. checkpoint, checkpoint_sha256: the file of its weights and their digest. bits: ``W4A8``-style; widths:
    by module, with mixed precision. options: all of the method's. calibration: source, n, fingerprint. seconds: the
    method took.
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

    @classmethod
    def of(cls, model: Any, **settings: Any) -> Provenance:
        """Of a loaded model (:class:`quantlens.models.Model`), with what was done to it."""
        return cls(
            model=model.name,
            checkpoint=model.checkpoint,
            checkpoint_sha256=model.checkpoint_sha256,
            class_names=model.class_names,
            **settings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what need not be there is left out where it is None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in values.items() if v is not None or k not in ("method_version", "widths", "seconds")}


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
        provenance = Provenance(**{key: value for key, value in info.items() if key in known})
        notes = {key: value for key, value in info.items() if key not in known}
        return cls(quantizers, rewrites, notes, operators, provenance)


# -- bit widths ----------------------------------------------------------------------------------------------------
# Bit widths as people write them: ``W4A8`` is 4-bit weights and 8-bit activations, ``FP32`` leaves everything in
# float; a mapping gives single modules widths of their own (mixed precision).


FLOAT = 32


@dataclass(frozen=True)
class Bits:
    """Widths of weights and activations; 32 means float.

    modules: (name, widths) of the modules or sites that differ; the longest name that a site's name starts with (at a
    dot) counts. name: what a mixed-precision setting is called (``MP6``).

    >>> Bits.parse("w4a8")
    Bits(weights=4, activations=8, modules=(), name='')
    >>> str(Bits(4, 8))
    'W4A8'
    >>> str(Bits.parse({"default": "W6A6", "blocks.0.attn": "W8A8"}).of("blocks.0.attn.qkv"))
    'W8A8'
    """

    weights: int
    activations: int
    modules: tuple[tuple[str, Bits], ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        for what, value in (("weights", self.weights), ("activations", self.activations)):
            if value != FLOAT and not 2 <= value <= 10:
                raise QuantlensError(
                    f"{value} bits for {what}: choose 2 to 10, or {FLOAT} for float "
                    f"(for example W4A8, W8A{FLOAT} or FP32)"
                )

    @classmethod
    def parse(cls, text: str | Bits | Mapping[str, Any]) -> Bits:
        """Read ``W<n>A<m>`` (any case), ``FP32``, or a mapping {"default": "W6A6", module or site name: "W8A8" or a
        number for both}. Raises QuantlensError for anything else."""
        if isinstance(text, Bits):
            return text
        if isinstance(text, Mapping):
            return cls._from_mapping(text)
        clean = str(text).strip().upper()
        if clean in ("FP32", "FLOAT32", "FLOAT", "W32A32"):
            return cls(FLOAT, FLOAT)
        match = re.fullmatch(r"W(\d+)A(\d+)", clean)
        if match is None:
            raise QuantlensError(
                f"bits {text!r} not understood: write W4A8 (weights 4, activations 8) or FP32, or give a mapping from "
                'module names to such widths with a "default"'
            )
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def _from_mapping(cls, mapping: Mapping[str, Any]) -> Bits:
        def one(value: Any) -> Bits:
            return cls(value, value) if isinstance(value, int) else cls.parse(value)

        if "default" not in mapping:
            raise QuantlensError('mixed precision needs a "default" for the modules that it does not name: W8A8')
        default = one(mapping["default"])
        rest = [(str(k), one(v)) for k, v in mapping.items() if k not in ("default", "name")]
        return cls(default.weights, default.activations, tuple(sorted(rest)), str(mapping.get("name", "")))

    def to_mapping(self) -> dict[str, str]:
        """The inverse of parsing a mapping."""
        named = {"name": self.name} if self.name else {}
        return {**named, "default": str(Bits(self.weights, self.activations)), **{k: str(b) for k, b in self.modules}}

    def of(self, site: str) -> Bits:
        """Widths of a site."""
        fitting = [(len(k), b) for k, b in self.modules if site == k or site.startswith(f"{k}.")]
        return max(fitting, key=lambda found: found[0])[1] if fitting else Bits(self.weights, self.activations)

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
        return "FP32" if self.is_float else f"W{self.weights}A{self.activations}"
