"""A choice of widths as a value: an :class:`Allocation`, which is a JSON file, and the targets that one is made for."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantlens import _moved
from quantlens.errors import QuantlensError
from quantlens.files import write_whole
from quantlens.formats import floating_name
from quantlens.qmodel import Bits

FORMAT = 1
VERSION = 1
"""Part of every allocation; raised when the same input gives other widths."""

NARROWEST, WIDEST = 2, 10
POINTS = 500
"""Most points of a front that a file holds: all of them for transformers of equal blocks, else a regular choice."""
DRAWN = 80
"""Most points of a front that a quantized model remembers, for drawing."""


@dataclass(frozen=True)
class GroupChoice:
    """One group and its width.

    modules: what it covers, as names of :class:`Bits`. sensitivity, size (bytes), bops: by candidate width.
    """

    name: str
    kind: str
    block: str
    modules: tuple[str, ...]
    bits: int
    sensitivity: dict[int, float]
    size: dict[int, int]
    bops: dict[int, int]


@dataclass(frozen=True)
class FrontPoint:
    """A choice that no other beats: the cost of the whole model, total sensitivity, width of each group."""

    cost: int
    sensitivity: float
    bits: tuple[int, ...]


@dataclass(frozen=True)
class Allocation:
    """A width for the attention and the MLP of every block, and how it was chosen. ``bits()`` is what
    :func:`quantlens.quantize` takes; so is the allocation itself, and the file that :meth:`save` writes.

    name: ``MP6``. target: width of what is in no group, and of the uniform model. cost: "size" (bytes) or "bops".
    budget, total: of the whole model, in the unit of ``cost``. fixed: cost of what is in no group, by kind of cost.
    sensitivity: its name; options, info: its settings and by-products. seconds: time taken by the sensitivities.
    front: the Pareto front, by rising cost; empty if not asked for.
    """

    name: str
    model: str
    checkpoint_sha256: str | None
    target: int
    candidates: tuple[int, ...]
    sensitivity: str
    cost: str
    budget: int
    total: int
    groups: tuple[GroupChoice, ...]
    fixed: dict[str, int]
    seed: int
    seconds: float
    calibration: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    front: tuple[FrontPoint, ...] = ()
    version: int = VERSION

    def bits(self) -> Bits:
        """Widths per module, weights and activations alike."""
        named = {module: group.bits for group in self.groups for module in group.modules}
        return Bits.parse({"name": self.name, "default": self.target, **named})

    @property
    def loss(self) -> float:
        """Total sensitivity of the choice."""
        return sum(group.sensitivity[group.bits] for group in self.groups)

    def cost_of(self, kind: str, bits: int | None = None) -> int:
        """Cost of the whole model ("size" or "bops"): as chosen, or with every group at one width."""
        return self.fixed[kind] + sum(getattr(g, kind)[g.bits if bits is None else bits] for g in self.groups)

    def loss_of(self, bits: int) -> float:
        """Total sensitivity with every group at one of the candidate widths."""
        return sum(group.sensitivity[bits] for group in self.groups)

    def frontier(self, most: int = POINTS) -> dict[str, Any]:
        """The front as plain data, for drawing: (cost, sensitivity) of ``most`` of its points at most, of every
        candidate width used everywhere ("uniform": [bits, cost, sensitivity]) and of the choice."""
        front = [[p.cost, p.sensitivity] for p in self.front]
        return {
            **{key: getattr(self, key) for key in ("name", "model", "sensitivity", "cost")},
            "points": [front[i] for i in evenly_spaced(len(front), most)],
            "uniform": [[b, self.cost_of(self.cost, b), self.loss_of(b)] for b in self.candidates],
            "chosen": [self.total, self.loss],
        }

    def check(self, model: Any) -> None:
        """Raises QuantlensError if this allocation was made for another model."""
        if self.checkpoint_sha256 == model.checkpoint_sha256:
            return
        mine, given = (str(sha or "unknown")[:12] for sha in (self.checkpoint_sha256, model.checkpoint_sha256))
        raise QuantlensError(
            f"this allocation was made for {self.model} (checkpoint {mine}), not for {model.name} (checkpoint "
            f"{given}); run `quantlens allocate {model.name}` for a new one"
        )

    # -- files ------------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Plain data that is valid JSON."""
        return {"format": FORMAT, **asdict(self)}

    def summary(self) -> dict[str, Any]:
        """What a quantized model remembers of it."""
        kept = ("name", "sensitivity", "target", "candidates", "cost", "budget", "total", "seconds", "seed", "options")
        groups = [{"name": g.name, "kind": g.kind, "block": g.block, "bits": g.bits} for g in self.groups]
        return {
            **{key: getattr(self, key) for key in kept},
            "candidates": list(self.candidates),
            "groups": groups,
            "frontier": self.frontier(DRAWN),
        }

    def save(self, path: str | Path) -> Path:
        """Write it as JSON; the file is there whole or not at all. Raises StorageError."""
        return write_whole(
            Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", what="the allocation"
        )

    @classmethod
    def load(cls, path: str | Path) -> "Allocation":
        """Read what :meth:`save` wrote. Raises QuantlensError for anything else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise QuantlensError(
                f"{path} cannot be read as an allocation ({error}); `quantlens allocate` writes one"
            ) from None
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: Any, where: str = "this") -> "Allocation":
        """The inverse of :meth:`to_dict`. Raises QuantlensError, naming ``where``."""
        from pydantic import TypeAdapter

        if not isinstance(data, Mapping) or "groups" not in data:
            raise QuantlensError(f"{where} is no allocation of quantlens; `quantlens allocate` writes one")
        if data.get("format") != FORMAT:
            raise QuantlensError(
                f"{where} has format {data.get('format')!r}, and this quantlens reads {FORMAT}; make it anew with "
                "`quantlens allocate`"
            )
        try:
            return TypeAdapter(cls).validate_python({k: v for k, v in data.items() if k != "format"})
        except ValueError as error:
            raise QuantlensError(f"{where} is a damaged allocation of quantlens ({error})") from None


# -- targets ----------------------------------------------------------------------------------------------------------
def parse_target(text: str | int) -> int:
    """The width that ``MP6``, ``W6A6`` or ``6`` names. Raises QuantlensError for anything else."""
    if floating_name(text):
        raise QuantlensError(f"target {text!r}: a floating-point format has one width; write MP6, for integers")
    match = re.fullmatch(r"(?:MP|W(?=(\d+)A\1$))?(\d+)(?:A\d+)?", str(text).strip().upper())
    if match is None or ("A" in str(text).upper() and match[1] is None):
        raise QuantlensError(
            f"target {text!r} not understood: write MP6, W6A6 or 6 (weights and activations of a group share a width)"
        )
    width = int(match[2])
    if not NARROWEST <= width <= WIDEST:
        raise QuantlensError(f"target {text!r}: choose {NARROWEST} to {WIDEST} bits")
    return width


def is_target(text: object) -> bool:
    """Whether ``text`` is a mixed-precision target such as ``MP6``."""
    return isinstance(text, str) and re.fullmatch(r"MP\d+", text.strip().upper()) is not None


def default_candidates(target: int) -> tuple[int, ...]:
    """{target − 2 … target + 2} (the paper's {4 … 8} for 6 and {6 … 10} for 8), within 2 … 10."""
    return tuple(range(max(NARROWEST, target - 2), min(WIDEST, target + 2) + 1))


def evenly_spaced(count: int, most: int) -> Sequence[int]:
    """``most`` of ``count`` positions at most, evenly spread, both ends among them."""
    return range(count) if count <= most else sorted({math.floor(i * (count - 1) / (most - 1)) for i in range(most)})


__getattr__ = _moved.finder(__name__)
