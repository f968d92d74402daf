"""What the model looks at: maps and token norms in pictures, drift against bits, and whether drift goes with what is
lost out of distribution. Everything from the results' "attention" and "attention_examples"."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from quantlens.attention import pictures
from quantlens.attention.association import FEWEST, Association, associate
from quantlens.errors import QuantlensError
from quantlens.metrics import METRICS
from quantlens.plots import svg
from quantlens.plots.svg import Frame, Point, Series, coord, marker
from quantlens.report.charts import FAMILIES, Looks, Panel, PanelRow, describe, family_widths
from quantlens.report.collect import Board, Group, Path, change_of, dig
from quantlens.report.tables import Row, Table, Value, seeds_text
from quantlens.report.text import (
    BASELINE,
    MISSING,
    Stat,
    count,
    fixed,
    join_words,
    mean_std,
    metric_heading,
    number,
    score_label,
)

PICTURE_BYTES = 9_000_000
"""All pictures together, so that the file stays under 15 MB; further images are left out and counted."""
SIDE = 96

Pick = Callable[[Mapping[str, Any]], float | None]
"""A figure of a drift summary."""


@dataclass(frozen=True)
class Measure:
    """A figure of a drift summary: title, axis, how it is read, decimals, limits of its axis."""

    title: str
    axis: str
    pick: Pick
    digits: int = 3
    floor: float | None = 0.0
    ceiling: float | None = None
    factor: float = 1.0


def _of(
    name: str, digits: int = 3, floor: float | None = 0.0, ceiling: float | None = None, factor: float = 0
) -> Measure:
    """A metric of a drift summary as it is stored."""
    metric = METRICS[name]

    def pick(summary: Mapping[str, Any]) -> float | None:
        return number(summary.get(name))

    return Measure(metric_heading(name), metric.label, pick, digits, floor, ceiling, metric.factor)


def _less_one(summary: Mapping[str, Any]) -> float | None:
    value = number(summary.get("rollout_spearman"))
    return None if value is None else 1 - value


def _outlier_change(summary: Mapping[str, Any]) -> float | None:
    here, there = number(summary.get("outliers")), number(summary.get("outliers_fp32"))
    return None if here is None or there is None else abs(here - there)


RANK = _of("rollout_spearman", 3, None, 1.0)
KL = _of("row_kl")
OUTLIERS = _of("outliers", 1)
OVERLAP = _of("rollout_overlap", 1)
CHANGED = _of("prediction_changed", 1)
OUTPUT = _of("output_kl")
CURVES = (RANK, KL, OUTLIERS)
TABLED = (
    RANK,
    OVERLAP,
    _of("centre_movement", 1),
    KL,
    _of("row_cosine"),
    _of("entropy_change", 3, None),
    _of("outlier_overlap", 1),
    CHANGED,
    _of("confidence_change", 1, None),
    OUTPUT,
)
CAUSES = (
    Measure("1 − rollout rank correlation", "1 − rollout rank correlation", _less_one),
    KL,
    Measure("Centre of mass moved", "share of the diagonal", lambda s: number(s.get("centre_movement"))),
    Measure("Outlier tokens, change of their number", "outlier tokens per image, change", _outlier_change, 1),
    OUTPUT,
)
"""What may go with the change of AUPR-out; the last is not attention, and stands there to compare."""


@dataclass(frozen=True)
class Shot:
    """A picture of the grid: a data URI, what it shows in words, and the prediction under it."""

    uri: str
    alt: str
    label: str = ""
    probability: str = ""
    changed: bool = False


@dataclass
class Gallery:
    """One image as all models see it: rows (title, note, cells by precision)."""

    key: str
    kind: str
    title: str
    detail: str
    columns: list[str]
    maps: list[tuple[str, str, list[Shot | None]]]
    norms: list[tuple[str, str, list[Shot | None]]]
    alternative: bool = False


@dataclass
class Attention:
    """Everything of the section; ``reasons`` says of models without figures why they have none."""

    galleries: list[Gallery] = field(default_factory=list)
    left_out: int = 0
    curves: list[PanelRow] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    scatter: list[Panel] = field(default_factory=list)
    links: list[list[str]] = field(default_factory=list)
    linked: str = ""
    n: str = ""
    reasons: list[str] = field(default_factory=list)


LINK_COLUMNS = [
    "Drift",
    "Measured on",
    "Cells",
    "Pearson",
    "Spearman",
    "95 % interval",
    "Spearman within precisions",
]


def attention(board: Board, looks: Looks) -> Attention | None:
    """The section, or None for a study that did not ask for it."""
    results = [r for r in board.results if isinstance(r.get("attention"), Mapping)]
    if not results:
        return None
    found = Attention()
    reasons: dict[str, str] = {}
    for group in board.groups:
        for result in [r for rs in group.cells.values() for r in rs] + [group.fp32 or {}]:
            why = dig(result, ("attention", "unavailable"))
            if why:
                reasons[group.model] = str(why)
    found.reasons = [f"{model}: {why}." for model, why in reasons.items()]
    if not any(summary_of(r, "id") for r in results):
        return found
    sizes = sorted({int(n) for r in results if (n := number(dig(r, ("attention", "id", "n")))) is not None})
    found.n = " to ".join(str(n) for n in dict.fromkeys((sizes[0], sizes[-1])))
    found.galleries, found.left_out = galleries(board)
    found.curves = curves(board, looks)
    found.tables = [t for t in (table_of(board, m) for m in (OUTLIERS, *TABLED)) if t is not None]
    found.scatter, found.links, found.linked = correlations(board, looks)
    return found


# -- figures ----------------------------------------------------------------------------------------------------------
def summary_of(result: Mapping[str, Any] | None, where: str) -> list[Mapping[str, Any]]:
    """The drift summaries of a result: that of the ID images ("id") or those of all OOD sets ("ood")."""
    found = dig(result, ("attention", where))
    parts = [found] if where == "id" else list(found.values()) if isinstance(found, Mapping) else []
    return [p for p in parts if isinstance(p, Mapping)]


def figure(result: Mapping[str, Any] | None, where: str, measure: Measure) -> float | None:
    """A figure of a result; on OOD images the mean over their sets."""
    stat = Stat.of(measure.pick(s) for s in summary_of(result, where))
    return None if stat is None else stat.mean


def stat_of(group: Group, bits: str, where: str, measure: Measure) -> Stat | None:
    """Mean and standard deviation over seeds."""
    results = [group.fp32] if bits == BASELINE else group.cells.get(bits, [])
    return Stat.of(figure(r, where, measure) for r in results)


WHERE = {"id": "ID images", "ood": "OOD images, mean of the sets"}


def curves(board: Board, looks: Looks) -> list[PanelRow]:
    """Drift against bits: both operands, weights alone, activations alone; ID and OOD images apart."""
    rows = []
    for heading, x_label, width_of in FAMILIES:
        widths = family_widths(board, width_of)
        if len(widths) < 2:
            continue
        places = [(float(w), b) for w, b in widths.items()]
        last = float(max(8, *widths))
        labels = [(float(n), str(n)) for n in range(min(widths), int(last) + 1)]
        if BASELINE in board.precisions:
            places.append((last + 1.2, BASELINE))
            labels.append((last + 1.2, BASELINE))
        panels: dict[str, list[Panel]] = {where: [] for where in WHERE}
        for measure in CURVES:
            drawn = [
                (where, name, lines(looks, groups, places, where, measure))
                for where in WHERE
                for name, groups in looks.facets()
            ]
            ticks = svg.value_range(
                [s for _, _, series in drawn for s in series], floor=measure.floor, ceiling=measure.ceiling
            )
            for where, name, series in drawn:
                if not series:
                    continue
                title = f"{measure.title}, {WHERE[where]}, against {x_label}" + (f", {name}" if name else "")
                drawing = svg.line_chart(
                    series,
                    labels,
                    title=title,
                    description=describe(series, title),
                    y_label=measure.axis,
                    x_label=x_label,
                    ticks=ticks,
                )
                notes = " · ".join(filter(None, [WHERE[where], name]))
                panels[where].append(Panel(Markup(drawing), measure.title, notes))
        rows.append(PanelRow(heading, [p for drawn_there in panels.values() for p in drawn_there]))
    return rows


def lines(
    looks: Looks, groups: Sequence[Group], places: Sequence[tuple[float, str]], where: str, measure: Measure
) -> list[Series]:
    """A line per group; a precision without a figure is a gap."""
    found = []
    for group in groups:
        points: list[Point | None] = []
        for x, bits in places:
            stat = stat_of(group, bits, where, measure)
            if stat is None:
                points.append(None)
                continue
            words = f"{looks.label(group)}, {bits}: {mean_std(stat, measure.digits)}"
            points.append(Point(x, stat.mean, stat.std, words))
        if any(points):
            found.append(Series(looks.label(group), looks.style(group), looks.key(group), points))
    return found


def table_of(board: Board, measure: Measure) -> Table | None:
    """A measure by precision, on ID and on OOD images."""
    precisions = board.precisions
    rows = []
    for group in board.groups:
        values = []
        for where in WHERE:
            for bits in precisions:
                stat = stat_of(group, bits, where, measure)
                scaled = None if stat is None else stat.scaled(measure.factor)
                spread = "" if scaled is None or scaled.std is None else fixed(scaled.std, measure.digits)
                values.append(Value(fixed(None if scaled is None else scaled.mean, measure.digits), spread))
        rows.append(Row(group.model, group.method, seeds_text(group), values))
    if all(v.text == MISSING for row in rows for v in row.values):
        return None
    heads = [("ID images", precisions), ("OOD images, mean of the sets", precisions)]
    return Table(measure.title, heads, rows, more=measure is not OUTLIERS)


# -- drift and the change of AUPR-out ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pair:
    """One quantized cell: its group, precision, drift and change of AUPR-out."""

    group: Group
    bits: str
    seed: str
    x: float
    y: float


def pairs(board: Board, path: Path, where: str, measure: Measure) -> list[Pair]:
    """(drift, change of AUPR-out in points) of every quantized cell that has both."""
    found = []
    for group in board.groups:
        for bits, results in group.cells.items():
            for result in results:
                x, change = figure(result, where, measure), change_of(group, result, path)
                if x is not None and change is not None:
                    found.append(Pair(group, bits, str(result.get("seed")), x, 100 * change))
    return found


def correlations(board: Board, looks: Looks) -> tuple[list[Panel], list[list[str]], str]:
    """(scatter plots, rows of the table in LINK_COLUMNS, what it is that changes)."""
    parts, score = board.parts(), board.score
    if not parts or score is None:
        return [], [], ""
    names = {"far": "mean of the far sets", "near": "mean of the near sets", "all": "mean of all sets"}
    what = f"AUPR-out by {score_label(score)}, {names[parts[0]]}"
    path = ("ood_mean", parts[0], score, "aupr_out")
    panels, rows = [], []
    for measure in CAUSES:
        for where in WHERE:
            points = pairs(board, path, where, measure)
            if not points:
                continue
            found = associate(
                [p.x for p in points],
                [p.y for p in points],
                [(p.group.index, p.bits) for p in points],
                [p.bits for p in points],
            )
            rows.append(
                [
                    measure.title,
                    "ID" if where == "id" else "OOD",
                    f"{found.n} ({count(found.conditions, 'condition')})",
                    _r(found.pearson),
                    _r(found.spearman),
                    MISSING if found.low is None else f"{_r(found.low)} to {_r(found.high)}",
                    _r(found.within),
                ]
            )
            if measure in CAUSES[:2]:
                panels.append(scatter(points, looks, measure, where, what, found))
    return panels, rows, what


def _r(value: float | None) -> str:
    return fixed(value, 2)


def scatter(points: Sequence[Pair], looks: Looks, measure: Measure, where: str, what: str, found: Association) -> Panel:
    """Change of AUPR-out against drift, a mark per cell."""
    xs = svg.nice_ticks(min(0.0, *(p.x for p in points)), max(p.x for p in points), 5)
    ys = svg.nice_ticks(min(p.y for p in points), max(0.0, *(p.y for p in points)), 8)
    frame = Frame((xs[0], xs[-1]), (ys[0], ys[-1]), top=26)
    frame.grid_y(ys)
    frame.axis_x((x, svg.tick_text(x, xs[1] - xs[0])) for x in xs)
    frame.labels(measure.axis, "Δ AUPR-out, points")
    if ys[-1] > 0:
        y = coord(frame.y(0.0))
        frame.body.append(f'<path class="a" d="M{frame.left} {y}H{frame.width - frame.right}"/>')
    by_key: dict[int, list[str]] = {}
    styles = {}
    for p in points:
        style = looks.style(p.group)
        tip = f"{p.group.name}, {p.bits}, seed {p.seed}: drift {fixed(p.x, measure.digits)}, "
        tip += f"Δ AUPR-out {fixed(p.y, 1, sign=True)} points"
        styles[looks.key(p.group)] = style
        by_key.setdefault(looks.key(p.group), []).append(marker(style.marker, frame.x(p.x), frame.y(p.y), tip))
    for key, marks in by_key.items():
        frame.body.append(f'<g class="s {styles[key].classes}" data-s="{key}">{"".join(marks)}</g>')
    title = f"Change of {what} against {measure.axis} on {WHERE[where]}"
    rho = "too few cells for a correlation" if found.spearman is None else f"Spearman {_r(found.spearman)}"
    interval = "" if found.low is None else f" (95 % {_r(found.low)} to {_r(found.high)})"
    words = f"{rho}{interval}, {count(found.n, 'cell')}"
    drawing = frame.svg(title, f"{title}: {words}.", "lines scatter")
    return Panel(Markup(drawing), measure.title, f"on {WHERE[where]} · {words}")


# -- pictures ---------------------------------------------------------------------------------------------------------
def galleries(board: Board) -> tuple[list[Gallery], int]:
    """(a gallery for each image that the FP32 cells show, how many were left out for their size)."""
    keys: dict[tuple[bool, str, int], Mapping[str, Any]] = {}
    for group in board.groups:
        for example in examples(group.fp32):
            if isinstance(example.get("thumbnail"), str):
                keys.setdefault((bool(example.get("ood")), str(example["set"]), int(example["index"])), example)
    found: list[Gallery] = []
    size = left_out = 0
    several: dict[tuple[bool, str], int] = {}
    for (ood, name, index), example in keys.items():
        number_of = several[ood, name] = several.get((ood, name), 0) + 1
        gallery = gallery_of(board, ood, name, index, example, number_of)
        shots = [s for rows in (gallery.maps, gallery.norms) for _, _, cells in rows for s in cells if s is not None]
        size += sum(len(s.uri) for s in shots)
        if size > PICTURE_BYTES:
            left_out += 1
            continue
        gallery.alternative = bool(found)
        found.append(gallery)
    return found, left_out


def examples(result: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The examples of a result that can be drawn."""
    listed = dig(result, ("attention_examples",))
    needed = ("set", "index", "grid", "rollout")
    return [
        e
        for e in (listed if isinstance(listed, list) else [])
        if isinstance(e, Mapping) and all(e.get(k) is not None for k in needed) and _as_map(e, e["rollout"]) is not None
    ]


def _as_map(example: Mapping[str, Any], values: Any) -> np.ndarray | None:
    """Stored values as a map [rows, columns]; None where they do not fit the grid."""
    try:
        grid = tuple(int(n) for n in example["grid"])
        array = np.asarray(values, dtype=np.float32)
        fits = len(grid) == 2 and 0 < array.size <= 1 << 16 and bool(np.isfinite(array).all())
        return array.reshape(grid) if fits else None
    except (TypeError, ValueError):
        return None


def gallery_of(board: Board, ood: bool, name: str, index: int, first: Mapping[str, Any], position: int) -> Gallery:
    """One image seen by every group at every precision (of the lowest seed)."""
    maps: list[tuple[str, str, list[Shot | None]]] = []
    norms: list[tuple[str, str, list[Shot | None]]] = []
    for group in board.groups:
        seen = {}
        for bits in board.precisions:
            at = [
                e
                for e in examples(group.first(bits))
                if (bool(e.get("ood")), str(e["set"]), e["index"]) == (ood, name, index)
            ]
            if at:
                seen[bits] = at[0]
        base = seen.get(BASELINE)
        photo = _photo(base) or _photo(first)
        if not seen or photo is None:
            continue
        row = [
            None if b not in seen else map_shot(seen[b], base, photo, f"{group.name}, {b}") for b in board.precisions
        ]
        maps.append((group.method, group.model, row))
        blocks = dict.fromkeys(k for e in seen.values() for k in (e.get("norms") or {}))
        for block in blocks:
            cells = [norm_shot(seen.get(b), base, block, f"{group.name}, {b}") for b in board.precisions]
            if any(cells):
                norms.append((f"{group.method}, {block}", group.model, cells))
    where = f"OOD set {name}" if ood else "ID"
    truth = first.get("truth_name") or (None if first.get("truth") is None else f"class {first['truth']}")
    detail = f"{where}, image {index}" + (f", labelled {truth}" if truth else "")
    title = f"{name if ood else 'ID'}: {truth or f'image {position}'}"
    return Gallery(f"{'ood' if ood else 'id'}-{name}-{index}", where, title, detail, board.precisions, maps, norms)


def _photo(example: Mapping[str, Any] | None) -> Any:
    try:
        text = (example or {}).get("thumbnail")
        return None if not isinstance(text, str) else pictures.from_webp(text)
    except QuantlensError:
        return None


def map_shot(example: Mapping[str, Any], base: Mapping[str, Any] | None, photo: Any, where: str) -> Shot:
    """A rollout map laid over the photograph."""
    values = _as_map(example, example["rollout"])
    assert values is not None
    picture = pictures.overlay(photo, values)
    label = str(example.get("class_name") or f"class {example.get('label')}")
    probability = number(example.get("probability"))
    shown = "" if probability is None else f"{fixed(100 * probability, 0)} %"
    changed = base is not None and base.get("label") != example.get("label")
    uri = f"data:image/webp;base64,{pictures.webp(picture, quality=70)}"
    return Shot(uri, f"Rollout map, {where}: {label} {shown}", label, shown, changed)


def norm_shot(example: Mapping[str, Any] | None, base: Mapping[str, Any] | None, block: str, where: str) -> Shot | None:
    """Norms of patch tokens behind a block, coloured from the smallest to the largest at FP32."""
    values = None if example is None else _as_map(example, (example.get("norms") or {}).get(block))
    if values is None or example is None:
        return None
    reference = None if base is None else _as_map(base, (base.get("norms") or {}).get(block))
    scale = values if reference is None else reference
    low, high = float(np.min(scale)), float(np.max(scale))
    picture = pictures.heat((values - low) / max(high - low, 1e-9))
    uri = f"data:image/webp;base64,{pictures.webp(picture, lossless=True)}"
    words = f"{fixed(float(np.min(values)), 1)} to {fixed(float(np.max(values)), 1)}"
    return Shot(uri, f"Token norms behind {block}, {where}: {words}", words)


# -- a file of its own ------------------------------------------------------------------------------------------------
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#5a646e}.g{stroke:#e9ecef;fill:none}.a{stroke:#5a646e;fill:none}"
    ".l{fill:none;stroke:currentColor;stroke-width:1.8}.m{fill:currentColor;stroke:#fff}.h1{font-size:14px;fill:#1c2126}"
    + "".join(
        f".c{i}{{color:{c}}}"
        for i, c in enumerate(("#0b62a4", "#c9500c", "#00795a", "#a8478a", "#9a6a00", "#3a8fc4", "#44494f"))
    )
)


def drift_svg(title: str, drifts: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Drift curves as one SVG file: a panel per figure, a line per image set.

    drifts: precision -> image set -> summary (:meth:`quantlens.attention.measure.Drift.summary`).
    """
    precisions = list(drifts)
    sets = list(dict.fromkeys(s for by_set in drifts.values() for s in by_set))
    places = [(float(i), b) for i, b in enumerate(precisions)]
    shown = [RANK, KL, OUTLIERS, OVERLAP, CHANGED, OUTPUT]
    body = [f'<rect width="1240" height="660" fill="#fff"/><text class="h1" x="16" y="24">{html.escape(title)}</text>']
    x = 16.0
    for i, name in enumerate(sets):
        look = svg.Style.numbered(i)
        body.append(
            f'<g class="{look.classes}"><path class="l" d="M{x} 44h24"/>{marker(look.marker, x + 12, 44, "")}</g>'
            f'<text x="{x + 30}" y="48">{html.escape(name)}</text>'
        )
        x += 46 + 7.5 * len(name)
    for k, measure in enumerate(shown):
        series = []
        for i, name in enumerate(sets):
            points: list[Point | None] = []
            for at, bits in places:
                value = measure.pick(drifts[bits].get(name, {}))
                points.append(
                    None if value is None else Point(at, value * measure.factor, None, f"{name}, {bits}: {value:.4g}")
                )
            series.append(Series(name, svg.Style.numbered(i), i, points))
        drawn = svg.line_chart(
            series,
            places,
            title=measure.title,
            description=describe(series, measure.title),
            y_label=measure.axis,
            floor=measure.floor,
            ceiling=measure.ceiling,
        )
        drawn = drawn.replace("<svg ", '<svg width="400" height="270" ', 1)
        left, top = 16 + (k % 3) * 408, 70 + (k // 3) * 296
        body.append(
            f'<g transform="translate({left} {top})"><text class="h1" x="4" y="0">{html.escape(measure.title)}</text>'
            f'<g transform="translate(0 6)">{drawn}</g></g>'
        )
    names = join_words(sets, limit=4)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1240 660" width="1240" height="660" role="img">'
        f"<title>{html.escape(title)}</title><desc>Drift of attention from FP32 at "
        f"{html.escape(join_words(precisions))} on {html.escape(names)}.</desc><style>{STYLE}</style>"
        f"{''.join(body)}</svg>\n"
    )


__all__ = ["FEWEST", "LINK_COLUMNS", "Attention", "attention", "drift_svg"]
