"""Exported files to choose among: accuracy, OOD detection, latency and size of each, and the Pareto front."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantlens.metrics import first_score, summary_of
from quantlens.studies.benchmarks import Timed
from quantlens.studies.board import Board, dig
from quantlens.studies.text import BASELINE, count, number


@dataclass(frozen=True)
class Choice:
    """One file at one place (processor, batch size, threads): its metrics (first, second: of :func:`judged_by`), and
    the words that stand where one is missing. over_float: the median of the float model in the same runtime and run,
    over this one's."""

    timed: Timed
    name: str
    latency: float
    size: float | None
    first: float | None
    second: float | None
    aupr: float | None
    words: str
    over_float: float | None

    def losses(self) -> tuple[float, ...] | None:
        """The four metrics of the front, each so that less is better; None where one is missing."""
        if self.first is None or self.aupr is None or self.size is None:
            return None
        return (-self.first, -self.aupr, self.latency, self.size)


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
        found.setdefault(one.place, {})[one.facts["fingerprint"]] = one
    listed = []
    for (cpu, batch, threads), rows in found.items():
        choices = [_choice(board, one) for one in rows.values()]
        heading = f"Batch {batch}, {count(threads, 'thread')}, {cpu}"
        listed.append(Place(heading, choices, pareto([c.losses() for c in choices])))
    return listed


def judged_by(board: Board) -> tuple[str, str]:
    """The two metrics of the ID images that files are shown by, of the task of the newest evaluation: top-1 and NLL, of
    a detector mAP and mAP@.5. The first one is weighed for the front."""
    first, second, *_ = summary_of(board.artefacts[-1][1].get("task") if board.artefacts else board.task)
    return first, second


def choice_score(board: Board) -> str:
    """The score that stands for those that were measured."""
    return first_score(name for _, result in board.artefacts for name in (dig(result, ("ood_mean", "all")) or {}))


def pareto(losses: Sequence[tuple[float, ...] | None]) -> list[int | None]:
    """For each point its own index where nothing dominates it, else the index of one that does (at least as good in
    all, better in one); None for a point without metrics. Less is better."""
    found: list[int | None] = []
    for i, own in enumerate(losses):
        better = (
            j
            for j, other in enumerate(losses)
            if own is not None
            and other not in (None, own)
            and all(a <= b for a, b in zip(other or (), own, strict=True))
        )
        found.append(next(better, None if own is None else i))
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
        return (one.result, "") if _images(one.result) == wanted else (None, "evaluated on other images")
    known = []
    if one.facts.get("bits") == BASELINE:
        known += [(r.get("checkpoint_sha256"), r, r.get("fp32")) for _, r in reversed(board.artefacts)]
        known += [(g.traits["checkpoint"], g.fp32, g.fp32) for g in board.groups if g.fp32_own and g.fp32]
    for checkpoint, result, fp32 in known:
        if fp32 and checkpoint and checkpoint == one.facts.get("checkpoint_sha256") and _images(result) == wanted:
            return fp32, "measured in PyTorch"
    return None, "not evaluated"


def _choice(board: Board, one: Timed) -> Choice:
    measured, words = _measured(board, one)

    def same(other: Timed) -> tuple[Any, ...]:
        runtime = str(other.facts.get("runtime", "")).partition(" ")[0]
        return other.run, other.place, other.facts.get("checkpoint_sha256"), runtime

    floats = (other for other in board.timings if other.facts.get("bits") == BASELINE and same(other) == same(one))
    base, (first, second) = next(floats, None), judged_by(board)
    return Choice(
        one,
        one.timing["label"],
        one.timing["median_ms"],
        number(one.timing.get("size_mb")),
        number(dig(measured, ("id", first))),
        number(dig(measured, ("id", second))),
        number(dig(measured, ("ood_mean", "all", choice_score(board), "aupr_out"))),
        words,
        None if base is None else base.timing["median_ms"] / one.timing["median_ms"],
    )
