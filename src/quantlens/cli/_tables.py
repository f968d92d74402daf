"""Results as tables of rich, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantlens.evaluation import Result
    from quantlens.evaluation.compare import Comparison, Difference


def result_tables(result: Result) -> list[Any]:
    """The tables of `quantlens evaluate`: percent, with the FP32 metric and the delta where they are known."""
    from rich.text import Text

    from quantlens.evaluation.result import summary

    parts: list[Any] = [*map(Text, summary(result)), _id_table(result)]
    if result.ood:
        parts += _ood_tables(result)
    if result.guard is not None:
        parts.append(_guard_table(result.guard))
    if result.ood and result.scores_unavailable:
        reasons: dict[str, list[str]] = {}
        for name, reason in result.scores_unavailable.items():
            reasons.setdefault(reason, []).append(name)
        parts += [Text(f"left out: {', '.join(names)} ({reason})") for reason, names in reasons.items()]
    return parts


def _id_table(result: Result) -> Any:
    from rich.table import Table

    compared = result.fp32 is not None
    table = Table(title="In distribution", title_justify="left")
    table.add_column("figure")
    for name in ("value", "FP32", "delta") if compared else ("value",):
        table.add_column(name, justify="right")
    for figure, title, percent in (
        ("top1", "top-1 %", True),
        ("top5", "top-5 %", True),
        ("nll", "NLL", False),
        ("ece", "ECE %", True),
        ("ece_adaptive", "adaptive ECE %", True),
        ("brier", "Brier", False),
    ):
        if figure in result.id:
            values = [result.id[figure]]
            if compared:
                values += [(result.fp32 or {})["id"].get(figure), (result.delta or {}).get("id", {}).get(figure)]
            table.add_row(title, *(_number(v, percent) for v in values))
    return table


def _ood_tables(result: Result) -> list[Any]:
    from rich.table import Table

    first = Table(title="Out of distribution, AUPR-out % by score", title_justify="left")
    first.add_column("score")
    columns = [(name, result.ood[name]) for name in result.ood]
    columns += [(f"mean {g}", result.ood_mean[g]) for g in ("far", "near") if g in result.ood_mean]
    for name, _ in columns:
        first.add_column(name, justify="right")
    scores = list(result.histograms) or [k for k, v in next(iter(result.ood.values())).items() if isinstance(v, dict)]
    for score in scores:
        first.add_row(score, *(_number(entry.get(score, {}).get("aupr_out"), True) for _, entry in columns))
    if scores:
        chance = (_number(entry.get(scores[0], {}).get("chance_aupr_out"), True) for _, entry in columns)
        first.add_row("chance", *chance)
    if result.fp32 is None or "msp" not in scores:
        return [first]
    second = Table(title="Quantization delta of AUPR-out by MSP, points", title_justify="left")
    deltas = (result.delta or {}).get("ood", {})
    for name in deltas:
        second.add_column(name, justify="right")
    second.add_row(*(_number(deltas[name].get("msp", {}).get("aupr_out"), True) for name in deltas))
    return [first, second]


def _guard_table(guard: Mapping[str, Any]) -> Any:
    """What the OOD threshold of a file keeps and flags, and how often it is right."""
    from rich.table import Table

    title = f"Guard: {guard['score']} below {guard['threshold']['value']:.3f} looks unknown"
    table = Table(title=title, title_justify="left")
    table.add_column("images")
    for name in ("looks known %", "looks unknown %", "balanced accuracy %"):
        table.add_column(name, justify="right")
    kept = guard["id"]["kept"]
    table.add_row("ID", _number(kept, True), _number(1 - kept, True), "–")
    for name, entry in guard["ood"].items():
        flagged, right = entry["flagged"], entry["balanced_accuracy"]
        table.add_row(name, *(_number(v, True) for v in (1 - flagged, flagged, right)))
    return table


def comparison_tables(comparison: Comparison) -> Iterator[Any]:
    """A table for every group of cells, and what must be said of them."""
    from rich.table import Table
    from rich.text import Text

    from quantlens.evaluation.compare import ALONE, LEVEL, STANDS

    yield Text(f"A: {comparison.a}\nB: {comparison.b}")
    for group in comparison.groups:
        seeds = f", {len(group.seeds)} seeds" if len(group.seeds) > 1 else ""
        images = "" if group.n_id is None else f", {group.n_id} ID images"
        title = f"{group.title['model']}, {group.title['method']}, {group.title['bits']}{seeds}{images}"
        grid = Table(title=Text(title), title_justify="left")
        grid.add_column("figure")
        certain = not group.without_interval
        heads = ["A", "B", "B − A", *([f"{LEVEL:.0%} interval", "p", "p (Holm)"] if certain else [])]
        for head in heads:
            grid.add_column(head, justify="right", no_wrap=True)
        if certain:
            grid.add_column("", no_wrap=True)
        for figure in group.figures:
            grid.add_row(*_row(figure, certain))
        yield grid
        if group.without_interval:
            yield Text(group.without_interval)
    if any(not group.without_interval for group in comparison.groups):
        yield Text(
            f"{comparison.resamples} resamples of the images (and seeds), seed {comparison.seed}. {STANDS}: p < 0.05 "
            f"after Holm's correction for all figures shown; {ALONE}: its interval leaves 0 out, but not so after the "
            "correction."
        )
    for note in comparison.notes:
        yield Text(f"note: {note}")
    if comparison.unpaired:
        yield Text(f"not paired: {', '.join(comparison.unpaired)}")


def _row(figure: Difference, certain: bool) -> list[Any]:
    from rich.text import Text

    from quantlens.evaluation.compare import NOT_PERCENT, title_of

    name = figure.path.rpartition(".")[2]
    scale, digits = (1, 3) if name in NOT_PERCENT else (100, 2)

    def text(value: float | None, sign: str = "") -> str:
        return "–" if value is None else f"{value * scale:{sign}.{digits}f}"

    cells: list[Any] = [Text(title_of(figure.path)), text(figure.a), text(figure.b), text(figure.difference, "+")]
    if certain:
        low, high = text(figure.low, "+"), text(figure.high, "+")
        p = ["–" if v is None else f"{v:.4f}" for v in (figure.p, figure.p_holm)]
        cells += [f"{low} to {high}", *p, figure.verdict or ""]
    return cells


def _number(value: Any, percent: bool) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f}" if percent else f"{value:.3f}"
