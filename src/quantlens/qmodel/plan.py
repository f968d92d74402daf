"""The plan: everything that makes a quantized model out of the FP32 graph, and who made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

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
