"""A page: one self-contained HTML file. Style and scripts are inlined and pinned by hash in a strict content policy."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from quantlens._version import __version__
from quantlens.report.charts import Charts, library

HERE = Path(__file__).parent


def render(template: str, charts: Charts, **context: Any) -> str:
    """The HTML text of a template, whose `chart(panel)` places a panel's chart."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"chart": charts, "version": __version__}
    style, script = (_asset(name) for name in ("report.css", "charts.js"))
    script += _asset("report.js")
    return environment.get_template(template).render(
        policy=content_policy(style, script, library()), style=Markup(style), script=Markup(script), **context
    )


def _asset(name: str) -> str:
    return (HERE / "assets" / name).read_text(encoding="utf-8")


def content_policy(style: str, *scripts: str) -> str:
    """Nothing is loaded from anywhere; only this style and these scripts run."""
    pins = [f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in (style, *scripts)]
    return (
        f"default-src 'none'; style-src {pins[0]}; script-src {' '.join(pins[1:])}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def safe_json(value: Any) -> Markup:
    """JSON that can stand inside a script element whatever text it holds."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
