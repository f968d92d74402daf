"""Exported files to choose among: accuracy, OOD detection, latency and size of each, and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantlens.studies.benchmarks import Timed
from quantlens.studies.board import Board, dig
from quantlens.studies.text import BASELINE, number


@dataclass(frozen=True)
class Choice:
    """One file at one place (processor, batch size, threads): its metrics, and the words that stand where one is
    missing."""

    timed: Timed
    top1: float | None
    nll: float | None
    aupr: float | None
    words: str
    over_float: float | None

    @property
    def latency(self) -> float:
        return float(self.timed.timing["median_ms"])

    @property
    def size(self) -> float | None:
        return number(self.timed.timing.get("size_mb"))

    @property
    def name(self) -> str:
        return str(self.timed.timing["label"])

    def losses(self) -> tuple[float, ...] | None:
        """The four metrics of the front, each so that less is better; None where one is missing."""
        if self.top1 is None or self.aupr is None or self.size is None:
            return None
        return (-self.top1, -self.aupr, self.latency, self.size)


@dataclass(frozen=True)
class Place:
    """What was timed on one processor with one batch size and thread count. front: for each choice its own index where
    it is on the Pareto front, the index of a better one where it is not, None where a metric is missing."""

    heading: str
    choices: list[Choice]
    front: list[int | None]


def places(board: Board) -> list[Place]:
    """The newest timing of every file, by place."""
    found: dict[tuple[str, int, int], dict[str, Timed]] = {}
    for one in board.timings:
        found.setdefault(one.place, {})[str(one.facts["fingerprint"])] = one
    listed = []
    for (cpu, batch, threads), rows in found.items():
        choices = [_choice(board, one) for one in rows.values()]
        heading = f"Batch {batch}, {threads} thread{'s' if threads > 1 else ''}, {cpu}"
        listed.append(Place(heading, choices, pareto([c.losses() for c in choices])))
    return listed


def choice_score(board: Board) -> str:
    """MSP where it was measured, else the first score there is."""
    names = [name for _, result in board.artefacts for name in (dig(result, ("ood_mean", "all")) or {})]
    return "msp" if "msp" in names or not names else str(names[0])


def pareto(losses: Sequence[tuple[float, ...] | None]) -> list[int | None]:
    """For each point its own index where nothing dominates it, else the index of one that does (at least as good in
    all, better in one); None for a point without metrics. Less is better."""
    found: list[int | None] = []
    for i, own in enumerate(losses):
        if own is None:
            found.append(None)
            continue
        better = (
            j
            for j, other in enumerate(losses)
            if other is not None and other != own and all(a <= b for a, b in zip(other, own, strict=True))
        )
        found.append(next(better, i))
    return found


def _images(result: Mapping[str, Any]) -> Any:
    """What two evaluations must share to be compared: the ID images and the OOD sets."""
    sets = result.get("ood") or {}
    return dig(result, ("id", "fingerprint")), {name: dig(entry, ("fingerprint",)) for name, entry in sets.items()}


def _measured(board: Board, one: Timed) -> tuple[Mapping[str, Any] | None, str]:
    """(metrics, words where there are none or where they come from elsewhere) of a timed model. The metrics are of the
    images of the newest evaluation."""
    wanted = _images(board.artefacts[-1][1]) if board.artefacts else None
    if one.result is not None:
        if _images(one.result) == wanted:
            return one.result, ""
        return None, "evaluated on other images"
    if one.facts.get("bits") != BASELINE:
        return None, "not evaluated"
    checkpoint = one.facts.get("checkpoint_sha256")
    for _, result in reversed(board.artefacts):
        same = checkpoint is not None and result.get("checkpoint_sha256") == checkpoint and _images(result) == wanted
        if same and isinstance(result.get("fp32"), Mapping):
            return result["fp32"], "measured in PyTorch"
    for group in board.groups:
        if group.fp32_own and group.fp32 and group.traits["checkpoint"] == checkpoint and _images(group.fp32) == wanted:
            return group.fp32, "measured in PyTorch"
    return None, "not evaluated"


def _choice(board: Board, one: Timed) -> Choice:
    figures, words = _measured(board, one)
    return Choice(
        one,
        number(dig(figures, ("id", "top1"))),
        number(dig(figures, ("id", "nll"))),
        number(dig(figures, ("ood_mean", "all", choice_score(board), "aupr_out"))),
        words,
        _over_float(board, one),
    )


def _over_float(board: Board, one: Timed) -> float | None:
    """The median of the float model in the same runtime and the same run, over this one's."""
    for other in board.timings:
        same = other.run == one.run and other.place == one.place
        same = same and other.facts.get("checkpoint_sha256") == one.facts.get("checkpoint_sha256")
        if same and other.facts.get("bits") == BASELINE and _runtime(other) == _runtime(one):
            return float(other.timing["median_ms"]) / float(one.timing["median_ms"])
    return None


def _runtime(one: Timed) -> str:
    return str(one.facts.get("runtime", "")).partition(" ")[0]
