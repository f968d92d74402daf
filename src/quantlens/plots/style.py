"""The one style of all plots, how panels are arranged, and a plot as a file."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import altair as alt

from quantlens.errors import UnknownNameError
from quantlens.files import write_whole

FORMATS = ("pdf", "png", "svg")

COLOURS = ("#0b62a4", "#c9500c", "#00795a", "#a8478a", "#9a6a00", "#3a8fc4", "#44494f")
"""Of the light theme; they differ in lightness too, and are told apart with the usual colour blindnesses."""
INK, MUTED, FAINT, PAPER = "#1c2126", "#5a646e", "#e9ecef", "#ffffff"
VARIABLES = {
    **{colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)},
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    FAINT: "var(--faint)",
    PAPER: "var(--bg)",
}
"""What stands for each colour in a page, so that figures follow its theme."""
SHAPES = ("circle", "square", "diamond", "triangle-up")
GLYPHS = ("●", "■", "◆", "▲")
DASHES = ([1, 0], [7, 3], [2, 3], [9, 3, 2, 3])
SIDE, COLUMNS = 330, 3
"""Width of a panel in a file, and how many stand side by side."""


@dataclass(frozen=True)
class Look:
    """The numbers of a line's colour, and of its dash and marker."""

    colour: int
    form: int = 0

    @staticmethod
    def numbered(index: int) -> "Look":
        """The look of the index-th of many lines: colours cycle, then dashes and markers change."""
        return Look(index % len(COLOURS), index // len(COLOURS) % len(SHAPES))


def encodings(looks: Mapping[str, Look]) -> dict[str, Any]:
    """Colour, marker and dash of the field "line", whose values are the names of `looks`."""
    names = list(looks)

    def scale(values: Iterable[Any]) -> Any:
        return alt.Scale(domain=names, range=list(values))

    return {
        "color": alt.Color("line:N", scale=scale(COLOURS[look.colour] for look in looks.values())),
        "shape": alt.Shape("line:N", scale=scale(SHAPES[look.form] for look in looks.values())),
        "strokeDash": alt.StrokeDash("line:N", scale=scale(DASHES[look.form] for look in looks.values())),
    }


def tooltips(**titles: str) -> list[Any]:
    """What a mark says: field -> title."""
    return [alt.Tooltip(f"{name}:N", title=title) for name, title in titles.items()]


Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One chart, the rows it shows, its caption and a second, smaller line. kind: what it is, a class on a page. group:
    the number of the board's group that it is of."""

    chart: Any
    rows: Rows
    caption: str
    detail: str = ""
    kind: str = "lines"
    group: str = ""

    def spec(self) -> dict[str, Any]:
        """As Vega-Lite, without configuration and parameters."""
        spec = self.chart.to_dict(validate=False)
        for part in (spec, *spec.get("layer", [])):
            if part.get("data") == {"name": "empty"}:  # what Altair puts in the place of no data
                del part["data"]
        words = ", ".join(filter(None, [self.caption, self.detail]))
        kept = {key: value for key, value in spec.items() if key not in ("config", "$schema", "datasets")}
        return kept | {"data": {"values": self.rows}, "description": words}


@dataclass
class PanelRow:
    """Panels under one heading; `note` says what is missing."""

    heading: str
    panels: list[Panel] = field(default_factory=list)
    note: str = ""
    large: bool = False


def one_row(panels: Iterable[Panel], heading: str = "", **about: Any) -> list[PanelRow]:
    """The panels that show something in one row; nothing without any."""
    found = [panel for panel in panels if panel.rows]
    return [PanelRow(heading, found, **about)] if found else []


def finished(spec: Mapping[str, Any], score: str = "", bits: str = "", **config: Any) -> dict[str, Any]:
    """A whole Vega-Lite specification in the style of all, of a score and a precision; no line is hidden."""
    values = {"score": score, "bits": bits, "hidden": []}
    return {
        "$schema": alt.SCHEMA_URL,
        "config": theme() | config,
        "params": [{"name": name, "value": value} for name, value in values.items()],
        **spec,
    }


def composed(rows: Sequence[PanelRow]) -> dict[str, Any]:
    """All panels of a figure side by side, under their headings."""
    parts = []
    for row in (r for r in rows if r.panels):
        charts = [{**p.spec(), "width": SIDE, "title": {"text": p.caption, "subtitle": p.detail}} for p in row.panels]
        heading = {"text": row.heading, "fontSize": 15}
        parts.append({"concat": charts, "columns": 2 if row.large else COLUMNS, "title": heading})
    return {"vconcat": parts}


def theme() -> dict[str, Any]:
    """The configuration of Vega-Lite."""
    words = {"labelColor": MUTED, "titleColor": MUTED, "labelFontSize": 11, "titleFontSize": 12}
    return {
        "background": PAPER,
        "font": "system-ui, -apple-system, Segoe UI, Roboto, Helvetica Neue, Liberation Sans, Arial, sans-serif",
        "view": {"stroke": None},
        "axis": {**words, "titleFontWeight": "normal", "domainColor": MUTED, "tickColor": MUTED, "gridColor": FAINT},
        "axisX": {"grid": False},
        "axisQuantitative": {"tickCount": 6},
        "axisY": {
            "domain": False,
            "ticks": False,
            "labelPadding": 6,
            "tickCount": 5,
            "titleAngle": 0,
            "titleAlign": "left",
            "titleAnchor": "end",
            "titleX": -28,
            "titleY": -10,
        },
        "legend": {
            **words,
            "labelColor": INK,
            "symbolStrokeWidth": 0,
            "title": None,
            "orient": "bottom",
            "columns": 2,
            "labelLimit": 400,
        },
        "title": {"anchor": "start", "color": INK, "fontSize": 13, "subtitleColor": MUTED, "subtitleFontSize": 11},
    }


class Figure:
    """A figure as a Vega-Lite specification. Notebooks show it."""

    def __init__(self, spec: dict[str, Any]):
        self.spec = spec

    def to_dict(self) -> dict[str, Any]:
        """The specification, with all values that are shown."""
        return self.spec

    def to_bytes(self, format: str) -> bytes:
        """As "pdf", "png" (at twice its size) or "svg". Raises UnknownNameError for another format."""
        import vl_convert

        if format not in FORMATS:
            raise UnknownNameError("format of a figure", format, FORMATS)
        settings = {"scale": 2} if format == "png" else {}
        drawn = getattr(vl_convert, f"vegalite_to_{format}")(self.spec, **settings)
        return drawn.encode() if isinstance(drawn, str) else bytes(drawn)

    def save(self, path: str | os.PathLike[str], format: str = "") -> Path:
        """Write it whole or not at all, by default in the format that the file's name ends in. Raises UnknownNameError
        for another format, StorageError."""
        target = Path(path)
        return write_whole(target, self.to_bytes((format or target.suffix[1:]).lower()), what="the figure")

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        major = str(self.spec["$schema"]).rpartition("/v")[2].partition(".")[0]
        return {f"application/vnd.vegalite.v{major}+json": self.spec}
