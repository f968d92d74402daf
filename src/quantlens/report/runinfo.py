"""What was run: images, checkpoints, calibration, environment, time, failures and the conventions of the metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlens.studies.board import Board, dig
from quantlens.studies.text import (
    BASELINE,
    MISSING,
    Stat,
    count,
    duration,
    fixed,
    metric_heading,
    number,
    percent,
    plain,
    score_label,
)

CONVENTIONS = (
    (
        "±",
        "sample standard deviation over seeds (n − 1); none where there is one seed. FP32 does not depend on the seed.",
    ),
    (
        "Δ",
        "quantized − FP32: a metric of the quantized model less the same metric at FP32, both on the same "
        "images. Shares in points (1 point = 1 %). A negative Δ of top-1 or AUPR-out (↑: higher is better) is "
        "a loss, and so is a positive Δ of NLL or ECE (↓: lower is better).",
    ),
    (
        "AUPR",
        "average precision: the step sum over the precision-recall curve, with tied scores taken as one "
        "threshold. AUPR-out: OOD images are the positive class. AUPR-in: ID images are.",
    ),
    (
        "Chance",
        "the AUPR of a score that knows nothing: the share of positive images. It depends on the counts, "
        "so AUPR is comparable only where the counts are the same.",
    ),
    (
        "FPR@95 (ID kept 95 %)",
        "the share of OOD images accepted by the threshold that keeps 95 % of the ID images.",
    ),
    (
        "FPR@95 (OOD caught 95 %)",
        "the share of ID images flagged by the threshold that catches 95 % of the OOD images.",
    ),
    ("ECE", "expected calibration error of the top-1 confidence, {bins}."),
    (
        "OOD scores",
        "larger means more like the ID images. Statistics (KNN, ViM, Mahalanobis, ReAct): {fitted}.",
    ),
    (
        "Far, near",
        "as the study names its sets; the means over far and near sets are taken apart, each set with equal weight.",
    ),
    ("WnAm", "weights at n bits, activations at m; {baseline} is the model before quantization."),
    (
        "Size",
        "MB of the packed checkpoint: integer codes at their bit width, with scales and what stays in floating point.",
    ),
)
"""(term, what it means here), with places for what a study says of its bins and fitted statistics."""


@dataclass(frozen=True)
class Listing:
    """A plain table: caption, column titles, rows of text, and which columns hold numbers."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    numeric: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Failure:
    """A failed cell: which, its error in one line, and the whole stored text where that is longer."""

    what: str
    error: str
    trace: str = ""


def listings(board: Board) -> list[Listing]:
    found = [
        images(board),
        checkpoints(board),
        preprocessing(board),
        calibration(board),
        unavailable(board),
        environments(board),
        times(board),
    ]
    return [table for table in found if table.rows]


def images(board: Board) -> Listing:
    """Every set of images with its role; a set named by several cells stands once."""
    rows: dict[tuple[str, ...], None] = {}

    def add(role: str, entry: Any) -> None:
        if isinstance(entry, Mapping):
            skipped = entry.get("skipped")
            skipped = len(skipped) if isinstance(skipped, list | tuple) else skipped
            rows[
                (
                    role,
                    *(plain(v) for v in (entry.get("source"), entry.get("fingerprint"), entry.get("n"), skipped)),
                )
            ] = None

    for result in board.results:
        add("in distribution", result.get("id"))
        for name, entry in (result.get("ood") or {}).items():
            kind = entry.get("group") if isinstance(entry, Mapping) else None
            add(f"OOD, {kind}: {name}" if kind else f"OOD: {name}", entry)
    for result in board.results:
        add("calibration", result.get("calibration"))
        add("fit of OOD statistics", result.get("fit"))
    rank = ["in distribution", "OOD", "calibration", "fit of OOD statistics"]
    ordered = sorted(rows, key=lambda row: next(i for i, r in enumerate(rank) if row[0].startswith(r)))
    return Listing(
        "Images",
        ["Role", "Source", "Fingerprint", "Images", "Skipped"],
        [list(r) for r in ordered],
        frozenset({3, 4}),
    )


def checkpoints(board: Board) -> Listing:
    """Each checkpoint with the FP32 metrics measured on the very images of this study."""
    rows: dict[str, list[str]] = {}
    for group in board.groups:
        sample = group.fp32 if group.fp32_own else next(iter(group.quantized), group.fp32)
        ids = dig(group.fp32, ("id",)) or {}
        metrics = [percent(number(ids.get(k))) for k in ("top1", "top5")]
        metrics += [
            fixed(number(ids.get("nll")), 3),
            percent(number(ids.get("ece"))),
            fixed(number(ids.get("brier")), 3),
        ]
        parameters = number(dig(sample, ("num_parameters",)))
        rows[group.model] = [
            group.model,
            plain(dig(sample, ("checkpoint_sha256",))),
            MISSING if parameters is None else f"{parameters / 1e6:.2f}",
            fixed(number(dig(group.fp32, ("size_mb",))), 1),
            *metrics,
        ]
    return Listing(
        "Checkpoints and their FP32 metrics on these images",
        [
            "Model",
            "SHA-256 of the checkpoint",
            "Parameters, millions",
            "FP32 size MB",
            *map(metric_heading, ("top1", "top5", "nll", "ece", "brier")),
        ],
        list(rows.values()),
        frozenset(range(2, 9)),
    )


def preprocessing(board: Board) -> Listing:
    keys = ["input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"]
    rows: dict[str, list[str]] = {}
    for group in board.groups:
        for result in (*group.quantized, *group.results(BASELINE)):
            found = result.get("preprocess")
            if isinstance(found, Mapping):
                rows.setdefault(group.model, [group.model, *(_short(found.get(k)) for k in keys)])
    return Listing(
        "Preprocessing, as the model's own configuration gives it",
        ["Model", "Input size", "Interpolation", "Crop share", "Crop mode", "Mean", "Std"],
        list(rows.values()),
    )


def calibration(board: Board) -> Listing:
    """Method, options and calibration images of every group; the options are those of its first cell."""
    rows = []
    for group in board.groups:
        first = next(iter(group.quantized), None)
        if first is None:
            continue
        options = first.get("options")
        found = dig(first, ("calibration",)) or {}
        rows.append(
            [
                group.model,
                group.method,
                plain(options) if options else "defaults",
                plain(found.get("source")),
                plain(found.get("n")),
            ]
        )
    return Listing(
        "Methods and calibration",
        ["Model", "Method", "Options", "Calibration images", "Images"],
        rows,
        frozenset({4}),
    )


def unavailable(board: Board) -> Listing:
    rows: dict[tuple[str, str, str], None] = {}
    for result in board.results:
        for score, reason in (dig(result, ("scores_unavailable",)) or {}).items():
            rows[(plain(result.get("model")), score_label(str(score)), plain(reason))] = None
    return Listing("Scores that could not be computed", ["Model", "Score", "Reason"], [list(r) for r in rows])


def machines(board: Board) -> list[dict[str, Any]]:
    """The distinct environments of the cells; the study's own where no cell has one."""
    found: dict[str, dict[str, Any]] = {}
    for result in board.results:
        entry = result.get("environment")
        if isinstance(entry, Mapping) and entry:
            found[json.dumps(entry, sort_keys=True, default=str)] = dict(entry)
    if not found and isinstance(board.study.get("environment"), Mapping):
        found["study"] = dict(board.study["environment"])
    return list(found.values())


def environments(board: Board) -> Listing:
    """Several machines side by side; a single one stands among the facts."""
    found = machines(board)
    keys = list(dict.fromkeys(k for e in found for k in e)) if len(found) > 1 else []
    rows = [[k, *(plain(e.get(k)) for e in found)] for k in keys]
    return Listing("Environments", ["", *(f"Machine {i + 1}" for i in range(len(found)))], rows)


def times(board: Board) -> Listing:
    """Mean seconds of a cell by group, and the sum over all cells."""
    rows = []
    for group in board.groups:
        cells = group.quantized
        stats = [Stat.of(dig(r, ("seconds", key)) for r in cells) for key in ("calibration", "evaluation")]
        if any(stats):
            rows.append(
                [
                    group.model,
                    group.method,
                    str(len(cells)),
                    *(duration(s.mean if s else None) for s in stats),
                ]
            )
    total = Stat.of(c.seconds for c in [*board.done, *board.inspections, *board.failed])
    caption = "Time per quantized cell (mean)"
    if total is not None:
        caption += f"; all cells together took {duration(total.mean * total.n)}"
    return Listing(caption, ["Model", "Method", "Cells", "Calibration", "Evaluation"], rows, frozenset({2, 3, 4}))


def failures(board: Board) -> list[Failure]:
    found = []
    for cell in board.failed:
        spec = cell.spec if isinstance(cell.spec, Mapping) else {}
        what = [plain(spec.get(k)) for k in ("model", "method", "bits") if spec.get(k) is not None]
        what += ["inspection"] if spec.get("inspects") else []
        if spec.get("seed") is not None:
            what.append(f"seed {plain(spec.get('seed'))}")
        text = str(cell.error or "no error message was stored").strip()
        last = text.splitlines()[-1].removeprefix("quantlens.errors.")
        found.append(Failure(" · ".join(what) or str(cell.key), last, text if text != last else ""))
    return found


def conventions(board: Board) -> list[tuple[str, str]]:
    """(term, what it means here)."""
    edges = next((e for r in board.results if isinstance(e := dig(r, ("id", "reliability", "edges")), list)), None)
    said = {"bins": f"{len(edges) - 1} bins of equal width" if edges else "bins of equal width"}
    said |= {"fitted": _fitted(board), "baseline": BASELINE}
    return [(term, meaning.format(**said)) for term, meaning in CONVENTIONS]


def _fitted(board: Board) -> str:
    """What the statistics of scores were fitted on."""
    fits = dict.fromkeys(
        f"{plain(f.get('source'))} ({count(int(n), 'image')})"
        for r in board.results
        if isinstance(f := r.get("fit"), Mapping)
        if (n := number(f.get("n"))) is not None
    )
    if not fits:
        return "no set of images for fitting is named in the store"
    return (
        f"fitted on each model's own features (a quantized model's on the quantized ones) of {'; '.join(fits)}, never "
        "on the images evaluated"
    )


def study_facts(board: Board) -> list[tuple[str, str]]:
    facts = [
        ("Study", plain(board.study.get("name") or "unnamed")),
        ("Created", date(board.study.get("created"))),
        ("Cells", cells_text(board)),
        ("Seeds", ", ".join(fixed(s, 0) for s in board.seeds) or MISSING),
    ]
    dates = sorted(str(c.created) for c in board.done if c.created)
    if dates:
        facts.append(("First and last cell", f"{date(dates[0])} to {date(dates[-1])}"))
    found = machines(board)
    if len(found) == 1:
        facts += [(str(k).capitalize(), plain(v)) for k, v in found[0].items()]
    return [(k, v) for k, v in facts if v != MISSING]


def cells_text(board: Board) -> str:
    """ "92 done, 1 failed, 3 still to run": the store's cells against the study's plan, where it has one."""
    done = len(board.done) + len(board.inspections)
    finished = done + len(board.failed)
    planned = number(board.study.get("planned"))
    text = f"{done} done, {len(board.failed)} failed"
    return text if planned is None or planned <= finished else f"{text}, {planned - finished:.0f} still to run"


def date(value: Any) -> str:
    """An ISO time to the minute: "2026-11-20 22:00"; other text as it is."""
    text = plain(value)
    return text[:16].replace("T", " ") if re.match(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d", text) else text


def config_text(board: Board) -> str:
    """The study's configuration, as stored."""
    config = board.study.get("config")
    if not config:
        return ""
    return config if isinstance(config, str) else json.dumps(config, indent=2, ensure_ascii=False, default=str)


def _short(value: Any) -> str:
    """Numbers of a list with four significant digits: "0.485, 0.456, 0.406"."""
    if isinstance(value, list | tuple):
        return ", ".join(f"{v:.4g}" if number(v) is not None else plain(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else plain(value)
