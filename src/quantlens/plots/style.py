"""The one style of all charts: CSS for a page, and the same with plain colours for an SVG file."""

from __future__ import annotations

import re
from pathlib import Path

_CSS = Path(__file__).with_name("charts.css")


def chart_style() -> str:
    """CSS of charts in a page, with the colours of the light theme as variables."""
    return _CSS.read_text(encoding="utf-8")


def file_style() -> str:
    """The same for an SVG file: many viewers know no variables, so their values stand in their place."""
    text = chart_style()
    variables = dict(re.findall(r"(--[\w-]+): ([^;]+);", text))
    rules = re.sub(r"/\*.*?\*/|:root \{.*?\}", "", text, flags=re.DOTALL)
    return re.sub(r"var\((--[\w-]+)\)", lambda found: variables[found[1]], rules).strip()
