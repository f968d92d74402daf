"""A page: one self-contained HTML file. Style and scripts are inlined and pinned by hash in a strict content policy.
Vega draws the charts of `plots` in the browser, from a compressed block that holds it and every chart's data."""

import base64
import gzip
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from quantlens._version import __version__
from quantlens.files import write_whole
from quantlens.plots.style import VARIABLES, Panel, finished
from quantlens.studies.text import count, join_words, metric_title, span

HERE = Path(__file__).parent


def render(template: str, *, shown: tuple[str, str] = ("", ""), **context: Any) -> str:
    """The HTML text of a template, whose `chart(panel)` places a panel's chart. shown: the score and the precision that
    charts show first."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["metric_title"] = metric_title
    environment.globals |= {
        "chart": Charts(*shown),
        "version": __version__,
        "count": count,
        "join_words": join_words,
        "span": span,
    }
    assets = ("report.css", "charts.js", "report.js")
    style, *scripts = ((HERE / "assets" / name).read_text(encoding="utf-8") for name in assets)
    script = "".join(scripts)
    return environment.get_template(template).render(
        policy=content_policy(style, script, library()), style=Markup(style), script=Markup(script), **context
    )


def write_page(path: str | Path, template: str, **context: Any) -> Path:
    """Write one self-contained HTML page; an existing file is replaced at once or not at all. Raises StorageError."""
    return write_whole(Path(path), render(template, **context), what="the page")


def content_policy(style: str, *scripts: str) -> str:
    """Nothing is loaded from anywhere; only this style and these scripts run."""
    pins = [f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in (style, *scripts)]
    return (
        f"default-src 'none'; style-src {pins[0]}; script-src {' '.join(pins[1:])}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


# ---- charts ----------------------------------------------------------------------------------------------------------


@cache
def library() -> str:
    """Vega, Vega-Lite and vega-embed as one script, which vl-convert brings."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


class Charts:
    """The charts of one page. score, bits: those shown first."""

    def __init__(self, score: str = "", bits: str = ""):
        self.score, self.bits = score, bits
        self.specs: list[dict[str, Any]] = []

    def __call__(self, panel: Panel) -> Markup:
        """The element that a panel's chart is drawn in. The legend of lines stands above all of them."""
        spec = {**panel.spec(), "width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
        config = {"legend": {"disable": True}} if panel.kind.startswith("lines") else {}
        self.specs.append(finished(spec, self.score, self.bits, **config))
        return Markup('<div class="chart {}" data-chart="{}"></div>').format(panel.kind, len(self.specs) - 1)

    def block(self) -> Markup:
        """The element with Vega and the data, which charts.js reads; empty for a page without charts."""
        if not self.specs:
            return Markup()
        specs = json.dumps(self.specs, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        for colour, variable in VARIABLES.items():
            specs = specs.replace(f'"{colour}"', f'"{variable}"')
        text = f'{{"library":{json.dumps(library())},"specs":{specs}}}'
        packed = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
        return Markup('<script type="application/gzip" id="charts">{}</script>').format(packed)
