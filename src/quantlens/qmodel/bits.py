"""Bit widths as people write them: ``W4A8`` is 4-bit weights and 8-bit activations, ``FP32`` leaves everything in
float; a mapping gives single modules widths of their own (mixed precision)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlens.errors import QuantlensError

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
