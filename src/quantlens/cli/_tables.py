"""Results as tables of rich, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantlens.evaluation import Result


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


def _number(value: Any, percent: bool) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f}" if percent else f"{value:.3f}"
