"""The figures of `plots` in a page: drawn by Vega in the browser, from a compressed block in the file that holds Vega
and every chart's data."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from markupsafe import Markup

from quantlens.plots.style import GLYPHS, VARIABLES, Look, Panel, finished


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


def legend(looks: Mapping[str, Look]) -> list[tuple[str, str, int]]:
    """(name, marker, number of its colour) of every line."""
    return [(name, GLYPHS[look.form], look.colour) for name, look in looks.items()]
