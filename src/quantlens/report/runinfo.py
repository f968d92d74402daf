"""What was run: images, checkpoints, calibration, environment, time and failures."""

import json
from dataclasses import dataclass
from typing import Any

from quantlens.metrics import TASKS, metrics_of
from quantlens.studies.board import Board, dig
from quantlens.studies.reproduce import command_of
from quantlens.studies.text import (
    BASELINE,
    MISSING,
    Stat,
    count,
    duration,
    fixed,
    mean_std,
    metric_digits,
    metric_heading,
    number,
    plain,
    score_label,
)


@dataclass(frozen=True)
class Listing:
    """A plain table: caption, column titles, rows of text, and which columns hold numbers."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    numeric: frozenset[int] = frozenset()


def listings(board: Board) -> list[Listing]:
    makers = (images, checkpoints, preprocessing, calibration, unavailable, environments, times)
    return [table for make in makers if (table := make(board)).rows]


def images(board: Board) -> Listing:
    """Every set of images with its role; a set named by several cells stands once."""
    rows: dict[tuple[Any, ...], None] = {}
    for result in board.results:
        found = [(0, "in distribution", result.get("id"))]
        for name, entry in (result.get("ood") or {}).items():
            found.append((1, f"OOD, {entry['group']}: {name}" if entry.get("group") else f"OOD: {name}", entry))
        found += [(2, "calibration", result.get("calibration")), (3, "fit of OOD statistics", result.get("fit"))]
        for rank, role, entry in found:
            if entry:
                source, mark, n, skipped = (entry.get(key) for key in ("source", "fingerprint", "n", "skipped"))
                skipped = len(skipped) if isinstance(skipped, list) else skipped
                rows[(rank, role, *map(plain, (source, mark, n, skipped)))] = None
    ordered = [list(row[1:]) for row in sorted(rows, key=lambda row: row[0])]
    return Listing("Images", ["Role", "Source", "Fingerprint", "Images", "Skipped"], ordered, frozenset({3, 4}))


def checkpoints(board: Board) -> Listing:
    """Each checkpoint with the FP32 metrics measured on the very images of this study."""
    usual = {
        "classification": ("top1", "top5", "nll", "ece", "brier"),
        "detection": ("map", "map50", "map75", "mar_100", "d_ece"),
    }
    names = usual.get(TASKS.get(board.task or "classify", "")) or metrics_of(board.task, resampled=True)[:5]
    rows: dict[str, list[str]] = {}
    for group in board.groups:
        sample = group.fp32 if group.fp32_own else next(iter(group.quantized), group.fp32)
        parameters = number(dig(sample, ("num_parameters",)))
        rows[group.model] = [
            group.model,
            plain(dig(sample, ("checkpoint_sha256",))),
            fixed(None if parameters is None else parameters / 1e6, 2),
            fixed(number(dig(group.fp32, ("size_mb",))), 1),
            *(mean_std(board.shown(group, BASELINE, ("id", name)), metric_digits(name)) for name in names),
        ]
    columns = [
        "Model",
        "SHA-256 of the checkpoint",
        "Parameters, millions",
        "FP32 size MB",
        *map(metric_heading, names),
    ]
    caption = "Checkpoints and their FP32 metrics on these images"
    return Listing(caption, columns, list(rows.values()), frozenset(range(2, 9)))


def preprocessing(board: Board) -> Listing:
    keys = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    rows: dict[str, list[str]] = {}
    for group in board.groups:
        for result in (*group.quantized, *group.results(BASELINE)):
            if found := result.get("preprocess"):
                rows.setdefault(group.model, [group.model, *(_short(found.get(k)) for k in keys)])
    columns = ["Model", "Input size", "Interpolation", "Crop share", "Crop mode", "Mean", "Std"]
    return Listing("Preprocessing, as the model's own configuration gives it", columns, list(rows.values()))


def calibration(board: Board) -> Listing:
    """Method, options and calibration images of every group; the options are those of its first cell."""
    rows = []
    for group in board.groups:
        for first in group.quantized[:1]:
            options, used = first.get("options"), first.get("calibration") or {}
            said = plain(options) if options else "defaults"
            rows.append([group.model, group.method, said, plain(used.get("source")), plain(used.get("n"))])
    columns = ["Model", "Method", "Options", "Calibration images", "Images"]
    return Listing("Methods and calibration", columns, rows, frozenset({4}))


def unavailable(board: Board) -> Listing:
    rows = dict.fromkeys(
        (plain(result.get("model")), score_label(score), plain(reason))
        for result in board.results
        for score, reason in (result.get("scores_unavailable") or {}).items()
    )
    return Listing("Scores that could not be computed", ["Model", "Score", "Reason"], list(map(list, rows)))


def machines(board: Board) -> list[dict[str, Any]]:
    """The distinct environments of the cells; the study's own where no cell has one."""
    found = [e for r in board.results if (e := r.get("environment"))] or [board.study.get("environment") or {}]
    return list({json.dumps(one, sort_keys=True): one for one in found if one}.values())


def environments(board: Board) -> Listing:
    """Several machines side by side; a single one stands among the facts."""
    found = machines(board)
    keys = dict.fromkeys(k for e in found for k in e) if len(found) > 1 else {}
    rows = [[k, *(plain(e.get(k)) for e in found)] for k in keys]
    return Listing("Environments", ["", *(f"Machine {i + 1}" for i in range(len(found)))], rows)


def times(board: Board) -> Listing:
    """Mean seconds of a cell by group, and the sum over all cells."""
    rows = []
    for group in board.groups:
        cells = group.quantized
        stats = [Stat.of(dig(r, ("seconds", key)) for r in cells) for key in ("calibration", "evaluation")]
        if any(stats):
            means = [duration(stat.mean) if stat else MISSING for stat in stats]
            rows.append([group.model, group.method, str(len(cells)), *means])
    total = sum(c.seconds for c in (*board.done, *board.inspections, *board.failed))
    caption = f"Time per quantized cell (mean); all cells together took {duration(total)}"
    return Listing(caption, ["Model", "Method", "Cells", "Calibration", "Evaluation"], rows, frozenset({2, 3, 4}))


def failures(board: Board) -> list[tuple[str, str, str]]:
    """Of every failed cell: which, its error in one line, and the whole stored text where that is longer."""
    found = []
    for cell in board.failed:
        what = [plain(cell.spec[k]) for k in ("model", "method", "bits") if cell.spec.get(k) is not None]
        what += ["inspection"] if cell.spec.get("inspects") else []
        what += [f"seed {cell.spec['seed']}"] if cell.spec.get("seed") is not None else []
        text = str(cell.error or "no error message was stored").strip()
        last = text.splitlines()[-1].removeprefix("quantlens.errors.")
        found.append((" · ".join(what) or cell.key, last, text if text != last else ""))
    return found


def bins(board: Board) -> int:
    """Into how many bins the confidences were put; 0 where no result says so."""
    edges = next((e for r in board.results if (e := dig(r, ("id", "reliability", "edges")))), [0])
    return len(edges) - 1


def fits(board: Board) -> list[str]:
    """The images that statistics of scores were fitted on."""
    found = [fit for result in board.results if (fit := result.get("fit"))]
    return list(
        dict.fromkeys(f"{plain(fit.get('source'))} ({count(int(fit.get('n') or 0), 'image')})" for fit in found)
    )


def study_facts(board: Board) -> list[tuple[str, str]]:
    facts = [
        ("Study", plain(board.study.get("name") or "unnamed")),
        ("Created", date(board.study.get("created"))),
        ("Cells", cells_text(board)),
        ("Seeds", ", ".join(map(str, board.seeds)) or MISSING),
    ]
    dates = sorted(str(c.created) for c in board.done)
    if dates:
        facts.append(("First and last cell", f"{date(dates[0])} to {date(dates[-1])}"))
    found = machines(board)
    if len(found) == 1:
        facts += [(k.capitalize(), plain(v)) for k, v in found[0].items()]
    return [(k, v) for k, v in facts if v != MISSING]


def cells_text(board: Board) -> str:
    """ "92 done, 1 failed, 3 still to run": the store's cells against the study's plan, where it has one."""
    done, failed = len(board.done) + len(board.inspections), len(board.failed)
    rest = board.study.get("planned", 0) - done - failed
    return f"{done} done, {failed} failed" + (f", {rest} still to run" if rest > 0 else "")


def date(value: Any) -> str:
    """An ISO time to the minute: "2026-11-20 22:00"."""
    return plain(value)[:16].replace("T", " ")


def config_text(board: Board) -> str:
    """The study's configuration, as stored."""
    config = board.study.get("config")
    return json.dumps(config, indent=2, ensure_ascii=False) if config else ""


def _short(value: Any) -> str:
    """Numbers of a list with four significant digits: "0.485, 0.456, 0.406"."""
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def again(board: Board) -> list[tuple[str, str]]:
    """(name, command that measures it again) of every row of the tables; none for a store without a directory."""
    if board.directory is None:
        return []
    rows = [(f"{model} FP32", {"model": model, "bits": BASELINE}) for model in board.models]
    rows += [(group.name, {"model": group.model, "method": group.method}) for group in board.groups if group.cells]
    return [(name, command_of(board.directory, **chosen)) for name, chosen in rows]
