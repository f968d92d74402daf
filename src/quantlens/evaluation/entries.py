"""What is compared: measured models by what they are, and which of them answer to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from quantlens.evaluation import outputs as kept
from quantlens.evaluation.outputs import Outputs

BASELINE = "FP32"
TRAITS = ("model", "method", "bits", "seed")


@dataclass(frozen=True, eq=False)
class Entry:
    """One measured model of a side. `result` is its result dictionary, None where only per-image outputs are at hand;
    `file` is where those are kept, None where they are `held` in memory or were not kept."""

    model: str
    method: str
    bits: str
    seed: int
    result: Mapping[str, Any] | None
    file: Path | None
    held: Outputs | None = None

    def __str__(self) -> str:
        return f"{self.model} {BASELINE if self.baseline else f'{self.method} {self.bits} seed {self.seed}'}"

    @property
    def baseline(self) -> bool:
        return self.bits == BASELINE

    @property
    def has_outputs(self) -> bool:
        """Whether there are per-image outputs."""
        return self.file is not None or self.held is not None

    @cached_property
    def outputs(self) -> Any:
        """The per-image outputs; None where none were kept. Raises StorageError for a damaged file."""
        return self.held if self.file is None else kept.read(self.file)

    def forget(self) -> None:
        """Give the outputs' memory back; they are read again when they are asked for."""
        self.__dict__.pop("outputs", None)

    @property
    def sets(self) -> dict[str, Mapping[str, Any]]:
        """What is known of every image set, the ID set as "": its fingerprint, and the group of an OOD set."""
        about = self.result or self.outputs.about
        return {"": about["id"], **about["ood"]}


@dataclass
class Match:
    """Cells that answer to each other: one pair per seed, everything else being fixed."""

    title: dict[str, str]
    """what both sides share, by trait"""
    pairs: list[tuple[Entry, Entry]] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        return [entry for pair in self.pairs for entry in pair]
