"""Results as tables of rich, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantlens.evaluation import Result
    from quantlens.evaluation.compare import Comparison, Difference
    from quantlens.metrics import Spread
    from quantlens.studies.results import Mean

CHANGE = "quantized − FP32"


def result_tables(result: Result) -> list[Any]:
    """The tables of `quantlens evaluate`: percent, with the FP32 metric and the change where they are known."""
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

    from quantlens.metrics import METRICS, names_of

    compared = result.fp32 is not None
    table = Table(title="In distribution", title_justify="left")
    table.add_column("metric")
    for name in ("value", "FP32", CHANGE) if compared else ("value",):
        table.add_column(name, justify="right")
    for name in names_of("classification"):
        if name in result.id:
            values = [result.id[name]]
            if compared:
                values.append((result.fp32 or {})["id"].get(name))
            row = [METRICS[name].text(value) for value in values]
            if compared:
                row.append(METRICS[name].text((result.change or {}).get("id", {}).get(name), "+"))
            table.add_row(METRICS[name].heading, *row)
    return table


def _ood_tables(result: Result) -> list[Any]:
    from rich.table import Table

    from quantlens.metrics import METRICS

    aupr = METRICS["aupr_out"]
    first = Table(title=f"Out of distribution, {aupr.heading} by score", title_justify="left")
    first.add_column("score")
    columns = [(name, result.ood[name]) for name in result.ood]
    columns += [(f"mean {g}", result.ood_mean[g]) for g in ("far", "near") if g in result.ood_mean]
    for name, _ in columns:
        first.add_column(name, justify="right")
    scores = list(result.histograms) or [k for k, v in next(iter(result.ood.values())).items() if isinstance(v, dict)]
    for score in scores:
        first.add_row(score, *(aupr.text(entry.get(score, {}).get("aupr_out")) for _, entry in columns))
    if scores:
        chance = (aupr.text(entry.get(scores[0], {}).get("chance_aupr_out")) for _, entry in columns)
        first.add_row("chance", *chance)
    if result.fp32 is None or "msp" not in scores:
        return [first]
    title = f"Change of {aupr.title} by MSP, {aupr.change_unit} ({CHANGE}) {aupr.arrow}"
    second = Table(title=title, title_justify="left")
    changes = (result.change or {}).get("ood", {})
    for name in changes:
        second.add_column(name, justify="right")
    second.add_row(*(aupr.text(changes[name].get("msp", {}).get("aupr_out"), "+") for name in changes))
    return [first, second]


def _guard_table(guard: Mapping[str, Any]) -> Any:
    """What the OOD threshold of a file keeps and flags, and how often it is right."""
    from rich.table import Table

    from quantlens.metrics import METRICS

    metrics = [METRICS[name] for name in ("kept", "flagged", "balanced_accuracy")]
    title = f"OOD threshold: {guard['score']} below {guard['threshold']['value']:.3f} looks unknown"
    table = Table(title=title, title_justify="left")
    table.add_column("images")
    for metric in metrics:
        table.add_column(metric.label, justify="right")
    kept = guard["id"]["kept"]
    rows = {"ID": (kept, 1 - kept, None)}
    for name, entry in guard["ood"].items():
        rows[name] = (1 - entry["flagged"], entry["flagged"], entry["balanced_accuracy"])
    for name, values in rows.items():
        table.add_row(name, *(metric.text(value) for metric, value in zip(metrics, values, strict=True)))
    return table


def comparison_tables(comparison: Comparison) -> Iterator[Any]:
    """A table for every group of cells, and what must be said of them."""
    from rich.table import Table
    from rich.text import Text

    from quantlens.evaluation.compare import LEVEL, SIGNIFICANT, UNCORRECTED

    yield Text(f"A: {comparison.a}\nB: {comparison.b}")
    for group in comparison.groups:
        seeds = f", {len(group.seeds)} seeds" if len(group.seeds) > 1 else ""
        images = "" if group.n_id is None else f", {group.n_id} ID images"
        title = f"{group.title['model']}, {group.title['method']}, {group.title['bits']}{seeds}{images}"
        grid = Table(title=Text(title), title_justify="left")
        grid.add_column("metric")
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
            f"{comparison.resamples} resamples of the images (and seeds), seed {comparison.seed}. {SIGNIFICANT}: "
            f"p < 0.05 after Holm's correction for all metrics; {UNCORRECTED}: its interval leaves 0 out, but p is "
            "not below 0.05 after the correction. ↑, ↓: whether higher or lower is better."
        )
    for note in comparison.notes:
        yield Text(f"note: {note}")
    if comparison.unpaired:
        yield Text(f"not paired: {', '.join(comparison.unpaired)}")


def _row(one: Difference, certain: bool) -> list[Any]:
    from rich.text import Text

    from quantlens.evaluation.result import title_of
    from quantlens.metrics import metric_of

    metric = metric_of(one.path)
    cells: list[Any] = [Text(title_of(one.path)), metric.text(one.a), metric.text(one.b)]
    cells.append(metric.text(one.difference, "+"))
    if certain:
        p = ["–" if v is None else f"{v:.4f}" for v in (one.p, one.p_holm)]
        cells += [f"{metric.text(one.low, '+')} to {metric.text(one.high, '+')}", *p, one.verdict or ""]
    return cells


def means_table(means: Sequence[Mean], title: str) -> Any:
    """Means over seeds, a row for every model, method and precision; metrics that none has are left out."""
    from rich.table import Table

    from quantlens.evaluation.result import title_of

    paths = dict.fromkeys(path for one in means for path, spread in one.metrics.items() if spread is not None)
    several = len({one.model for one in means}) > 1
    grid = Table(title=title, title_justify="left")
    for name in ("model", "method", "bits") if several else ("method", "bits"):
        grid.add_column(name)
    for path in paths:
        grid.add_column(title_of(path).replace(", ", "\n", 1), justify="right", no_wrap=True)
    last: tuple[str, str] | None = None
    for one in means:
        group = (one.model, one.method)
        if last is not None and group != last:
            grid.add_section()
        first, last = group != last, group
        names = [one.model if first else ""] if several else []
        cells = [_mean(path, one.metrics.get(path)) for path in paths]
        grid.add_row(*names, one.method if first else "", one.bits, *cells)
    return grid


def _mean(path: str, spread: Spread | None) -> str:
    """ "81.25 ± 0.31"; the mean alone of one seed, and of a size, which no seed changes."""
    from quantlens.metrics import metric_of

    metric = metric_of(path)
    if spread is None:
        return metric.text(None)
    mean = metric.text(spread.mean)
    return mean if spread.std is None or metric.family == "size" else f"{mean} ± {metric.text(spread.std)}"
