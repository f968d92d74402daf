"""The decision page: exported files by accuracy, OOD detection, latency and size, the Pareto front among them, and how
often their guards are right."""

from collections.abc import Sequence
from typing import Any

from quantlens.export.guards import separation_means
from quantlens.metrics import METRICS
from quantlens.plots.points import latency
from quantlens.report.runinfo import Listing
from quantlens.studies.board import Board, dig
from quantlens.studies.choices import Choice, choice_score, judged_by, places
from quantlens.studies.text import MISSING, fixed, join_words, metric_heading, number, percent, score_label

BEFORE = ["No.", "File", "Pareto front", "Runtime", "Model"]
AFTER = [
    metric_heading("aupr_out"),
    f"{metric_heading('median_ms')} (p10 to p90)",
    "× FP32 ↑",
    *map(metric_heading, ("images_per_second", "size_mb", "memory_mb")),
]
"""Columns of the table of files; between them are those of `studies.choices.judged_by`."""
TEXT_COLUMNS = frozenset({1, 2, 3, 4})


def decision(board: Board) -> dict[str, Any] | None:
    """What the report shows of exported files; None for a store without any. places: heading, table, panels and a note
    of each processor, batch size and thread count. guards: how often the thresholds of the files are right."""
    if not board.timings and not board.artefacts:
        return None
    judged = judged_by(board)
    columns = [*BEFORE, *map(metric_heading, judged), *AFTER]
    score, panels = score_label(choice_score(board)), {row.heading: row.panels for row in latency(board)}
    sections = []
    for place in places(board):
        table = Listing(
            f"Exported files: {place.heading}; AUPR-out by {score}, mean of the OOD sets",
            columns,
            [_row(i, c, best, judged) for i, (c, best) in enumerate(zip(place.choices, place.front, strict=True), 1)],
            frozenset(range(len(columns))) - TEXT_COLUMNS,
        )
        about = {"heading": place.heading, "note": _note(place.choices)}
        sections.append({**about, "table": table, "panels": panels.get(place.heading, [])})
    files = {facts["fingerprint"] for facts in (*(t.facts for t in board.timings), *(f for f, _ in board.artefacts))}
    sentence = f"The store holds {len(files)} exported or float models, timed or evaluated in their runtimes."
    title = METRICS[judged[0]].title
    return {"places": sections, "guards": guards(board), "score": score, "sentence": sentence, "judged": title}


def _note(choices: Sequence[Choice]) -> str:
    """What a reader must know before comparing rows."""
    notes = []
    if len({c.timed.run for c in choices}) > 1:
        notes.append("The rows were timed in different runs: only latencies of one run were interleaved.")
    missing = [c.name for c in choices if c.losses() is None]
    if missing:
        names = join_words(missing, limit=4)
        notes.append(f"Not weighed for the front, as a metric is missing: {names}.")
    return " ".join(notes)


def _row(place: int, choice: Choice, best: int | None, judged: tuple[str, str]) -> list[str]:
    timing, facts = choice.timed.timing, choice.timed.facts
    said = f" ({choice.words})" if choice.words and choice.first is not None else ""
    first, second = (METRICS[name] for name in judged)
    nothing = choice.words or "not measured"
    return [
        str(place),
        choice.name,
        "not weighed" if best is None else "on the front" if best + 1 == place else f"no: {best + 1} is better",
        str(facts.get("runtime", MISSING)) + (f", integers {facts['integers']}" if facts.get("integers") else ""),
        " ".join(str(facts.get(key, MISSING)) for key in ("model", "method", "bits")),
        nothing if choice.first is None else first.text(choice.first) + said,
        nothing if choice.second is None else second.text(choice.second),
        (choice.words if choice.first is None else "no OOD sets") if choice.aupr is None else percent(choice.aupr),
        f"{fixed(choice.latency, 2)} ({fixed(timing['p10_ms'], 2)} to {fixed(timing['p90_ms'], 2)})",
        "FP32 not timed" if choice.over_float is None else f"{fixed(choice.over_float, 2)}",
        fixed(timing["images_per_second"], 1),
        "no file" if choice.size is None else fixed(choice.size, 2),
        "not measured" if timing.get("memory_mb") is None else fixed(timing["memory_mb"], 0),
    ]


# ---- guards ----------------------------------------------------------------------------------------------------------


def guards(board: Board) -> Listing | None:
    """Shares of ID images kept and of OOD images flagged by the files that have a threshold, what it was set on and why
    its score was chosen; None without any."""
    having = [(facts, result["guard"]) for facts, result in board.artefacts if result.get("guard")]
    if not having:
        return None
    sets = dict.fromkeys(name for _, guard in having for name in guard["ood"])
    ood = [("ood", name, key) for name in sets for key in ("flagged", "balanced_accuracy")]
    columns = ["File", "Runtime", "Score", "Unknown below", "Set to keep %", metric_heading("kept")]
    columns += [f"{name}: {METRICS[key].label}" for _, name, key in ood]
    rows = []
    for facts, guard in having:
        row = [str(facts.get("file")), str(facts.get("runtime")), score_label(guard["score"])]
        row += [fixed(number(dig(guard, ("threshold", "value"))), 3), percent(number(guard.get("keep")))]
        row += [percent(number(dig(guard, path))) for path in (("id", "kept"), *ood)]
        means = separation_means(guard)
        named = "; ".join(f"{score_label(name)} {percent(value)}" for name, value in means.items())
        images = dig(guard, ("threshold", "images"))
        set_on = "not said" if images is None else f"{guard['threshold']['n']} images ({images})"
        rows.append([*row, set_on, named or "not compared"])
    caption = (
        "How often the guards are right: ID images kept, OOD images flagged, and the mean of the two; what the "
        "threshold was set on, and how the scores offered told these images from OOD-like ones made of them"
    )
    numbers = frozenset(range(3, len(columns)))
    return Listing(caption, [*columns, "Set on", "Scores offered, AUROC %"], rows, numbers)
