"""The decision page: exported files by accuracy, OOD detection, latency and size, the Pareto front among them, and how
often their guards are right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from quantlens.metrics import METRICS
from quantlens.plots import svg
from quantlens.plots.svg import Frame, Point, Series, Style, coord
from quantlens.report.charts import Panel
from quantlens.report.collect import Board, dig
from quantlens.report.frontier import legend_of
from quantlens.report.runinfo import Listing
from quantlens.report.text import BASELINE, MISSING, fixed, join_words, metric_heading, number, percent, score_label
from quantlens.studies.benchmarks import Timed

FRONT, BEHIND = Style(0), Style(1, 0, 1)
COLUMNS = [
    "No.",
    "File",
    "Pareto front",
    "Runtime",
    "Model",
    *map(metric_heading, ("top1", "nll", "aupr_out")),
    f"{metric_heading('median_ms')} (p10 to p90)",
    "× FP32 ↑",
    *map(metric_heading, ("images_per_second", "size_mb", "memory_mb")),
]
TEXT_COLUMNS = frozenset({1, 2, 3, 4})


@dataclass(frozen=True)
class Choice:
    """One file at one place (processor, batch size, threads): its figures, and the words that stand where one is
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
        """The four figures of the front, each so that less is better; None where one is missing."""
        if self.top1 is None or self.aupr is None or self.size is None:
            return None
        return (-self.top1, -self.aupr, self.latency, self.size)


@dataclass(frozen=True)
class Place:
    """One processor, batch size and thread count: its table, charts and what must be said of them."""

    heading: str
    table: Listing
    panels: list[Panel]
    note: str


@dataclass(frozen=True)
class Decision:
    """The section of the report; guards: how often the thresholds of the files are right."""

    places: list[Place]
    guards: Listing | None
    score: str
    legend: Markup
    sentence: str


def decision(board: Board) -> Decision | None:
    """What the report shows of exported files; None for a store without any."""
    if not board.timings and not board.artefacts:
        return None
    found: dict[tuple[str, int, int], dict[str, Timed]] = {}
    for one in board.timings:
        found.setdefault(one.place, {})[str(one.facts["fingerprint"])] = one
    score = _score(board)
    places = [_place(board, key, list(rows.values()), score) for key, rows in found.items()]
    legend = legend_of([("on the Pareto front", FRONT), ("not on it, or not evaluated", BEHIND)])
    files = len(
        {f for rows in found.values() for f in rows} | {str(facts["fingerprint"]) for facts, _ in board.artefacts}
    )
    sentence = f"The store holds {files} exported or float models, timed or evaluated in their runtimes."
    return Decision(places, guards(board), score_label(score), Markup(legend), sentence)


def _score(board: Board) -> str:
    """MSP where it was measured, else the first score there is."""
    names = [name for _, result in board.artefacts for name in (dig(result, ("ood_mean", "all")) or {})]
    return "msp" if "msp" in names or not names else str(names[0])


# ---- figures ---------------------------------------------------------------------------------------------------------


def _images(result: Mapping[str, Any]) -> Any:
    """What two evaluations must share to be compared: the ID images and the OOD sets."""
    sets = result.get("ood") or {}
    return dig(result, ("id", "fingerprint")), {name: dig(entry, ("fingerprint",)) for name, entry in sets.items()}


def _reference(board: Board) -> Any:
    """The images of the newest evaluation, which the page's figures are of."""
    return _images(board.artefacts[-1][1]) if board.artefacts else None


def _measured(board: Board, one: Timed) -> tuple[Mapping[str, Any] | None, str]:
    """(figures, words where there are none or where they come from elsewhere) of a timed model."""
    wanted = _reference(board)
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


def _choice(board: Board, one: Timed, score: str) -> Choice:
    figures, words = _measured(board, one)
    return Choice(
        one,
        number(dig(figures, ("id", "top1"))),
        number(dig(figures, ("id", "nll"))),
        number(dig(figures, ("ood_mean", "all", score, "aupr_out"))),
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


def pareto(losses: Sequence[tuple[float, ...] | None]) -> list[int | None]:
    """For each point its own index where nothing dominates it, else the index of one that does (at least as good in
    all, better in one); None for a point without figures. Less is better."""
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


# ---- a place ---------------------------------------------------------------------------------------------------------


def _place(board: Board, key: tuple[str, int, int], rows: Sequence[Timed], score: str) -> Place:
    cpu, batch, threads = key
    choices = [_choice(board, one, score) for one in rows]
    front = pareto([c.losses() for c in choices])
    heading = f"Batch {batch}, {threads} thread{'s' if threads > 1 else ''}, {cpu}"
    table = Listing(
        f"Exported files: {heading}; AUPR-out by {score_label(score)}, mean of the OOD sets",
        COLUMNS,
        [_row(i, c, front) for i, c in enumerate(choices)],
        frozenset(range(len(COLUMNS))) - TEXT_COLUMNS,
    )
    panels = [
        _panel(choices, front, f"Top-1 against latency: {heading}", METRICS["top1"].label, [c.top1 for c in choices]),
        _panel(
            choices,
            front,
            f"AUPR-out by {score_label(score)} against latency: {heading}",
            METRICS["aupr_out"].label,
            [c.aupr for c in choices],
        ),
    ]
    return Place(heading, table, [p for p in panels if p is not None], _note(choices))


def _note(choices: Sequence[Choice]) -> str:
    """What a reader must know before comparing rows."""
    notes = []
    if len({c.timed.run for c in choices}) > 1:
        notes.append("The rows were timed in different runs: only latencies of one run were interleaved.")
    missing = [c.name for c in choices if c.losses() is None]
    if missing:
        names = join_words(missing, limit=4)
        notes.append(f"Not weighed for the front, as a figure is missing: {names}.")
    return " ".join(notes)


def _row(index: int, choice: Choice, front: Sequence[int | None]) -> list[str]:
    timing, facts = choice.timed.timing, choice.timed.facts
    said = f" ({choice.words})" if choice.words and choice.top1 is not None else ""
    nothing = choice.words or "not measured"
    best = front[index]
    return [
        str(index + 1),
        choice.name,
        "not weighed" if best is None else "on the front" if best == index else f"no: {best + 1} is better",
        str(facts.get("runtime", MISSING)),
        " ".join(str(facts.get(key, MISSING)) for key in ("model", "method", "bits")),
        nothing if choice.top1 is None else percent(choice.top1, 2) + said,
        nothing if choice.nll is None else fixed(choice.nll, 3),
        (choice.words if choice.top1 is None else "no OOD sets") if choice.aupr is None else percent(choice.aupr),
        f"{fixed(choice.latency, 2)} ({fixed(timing['p10_ms'], 2)} to {fixed(timing['p90_ms'], 2)})",
        "FP32 not timed" if choice.over_float is None else f"{fixed(choice.over_float, 2)}",
        fixed(timing["images_per_second"], 1),
        "no file" if choice.size is None else fixed(choice.size, 2),
        "not measured" if timing.get("memory_mb") is None else fixed(timing["memory_mb"], 0),
    ]


def _panel(
    choices: Sequence[Choice], front: Sequence[int | None], title: str, y_label: str, values: Sequence[float | None]
) -> Panel | None:
    """A figure (a fraction) against latency: one numbered mark per row of the table, its area by file size."""
    shown = [(i, c, 100 * v) for i, (c, v) in enumerate(zip(choices, values, strict=True)) if v is not None]
    if not shown:
        return None
    ticks = svg.nice_ticks(0.0, max(c.latency for _, c, _ in shown), 5)
    heights = svg.nice_ticks(min(v for *_, v in shown) - 0.3, max(v for *_, v in shown) + 0.6, 5)
    frame = Frame((ticks[0], ticks[-1]), (heights[0], heights[-1]), height=300, top=26)
    frame.grid_y(heights)
    frame.axis_x((t, svg.tick_text(t, ticks[1] - ticks[0])) for t in ticks)
    frame.labels("median latency, ms", y_label)
    largest = max((c.size or 0.0 for _, c, _ in shown), default=0.0) or 1.0
    for i, choice, value in sorted(shown, key=lambda one: -(one[1].size or 0.0)):
        tip = f"{i + 1}. {choice.name}: {fixed(value, 2)} % in {fixed(choice.latency, 2)} ms"
        tip += "" if choice.size is None else f", {fixed(choice.size, 2)} MB"
        style = FRONT if front[i] == i else BEHIND
        radius = 3 + 5 * math.sqrt((choice.size or 0.0) / largest)
        point = Point(choice.latency, value, None, tip)
        frame.body.append(svg.draw_series(frame, Series(choice.name, style, i, [point]), radius=radius))
        x, y = frame.x(choice.latency), frame.y(value)
        frame.body.append(
            f'<text class="t" x="{coord(x)}" y="{coord(y - radius - 4)}" text-anchor="middle">{i + 1}</text>'
        )
    words = f"{title}. " + "; ".join(
        f"{i + 1} {c.name} {fixed(v, 2)} % at {fixed(c.latency, 2)} ms" for i, c, v in shown
    )
    return Panel(Markup(frame.svg(title, words + ".", "decision")), title, "numbers as in the table; area: file size")


# ---- guards ----------------------------------------------------------------------------------------------------------


def guards(board: Board) -> Listing | None:
    """Shares of ID images kept and of OOD images flagged by the files that have a threshold; None without any."""
    having = [(facts, result) for facts, result in board.artefacts if isinstance(result.get("guard"), Mapping)]
    if not having:
        return None
    sets = list(dict.fromkeys(name for _, result in having for name in result["guard"]["ood"]))
    columns = ["File", "Runtime", "Score", "Unknown below", "Set to keep %", metric_heading("kept")]
    columns += [
        f"{name}: {what}" for name in sets for what in (METRICS[key].label for key in ("flagged", "balanced_accuracy"))
    ]
    rows = []
    for facts, result in having:
        guard = result["guard"]
        row = [str(facts.get("file")), str(facts.get("runtime")), score_label(str(guard["score"]))]
        row += [fixed(number(dig(guard, ("threshold", "value"))), 3), percent(number(guard.get("keep")))]
        row += [percent(number(dig(guard, ("id", "kept"))))]
        for name in sets:
            row += [percent(number(dig(guard, ("ood", name, key)))) for key in ("flagged", "balanced_accuracy")]
        rows.append(row)
    caption = "How often the guards are right: ID images kept, OOD images flagged, and the mean of the two"
    return Listing(caption, columns, rows, frozenset(range(3, len(columns))))
