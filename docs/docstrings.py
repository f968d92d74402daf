"""Docstrings as Markdown for the API pages.

Sphinx roles become code, doctest lines a block of Python, and what is said of parameters ("model: … bits: …") a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import griffe


def as_markdown(text: str, names: Iterable[str] = ()) -> str:
    """names: of the parameters, or of a class's attributes."""
    text = re.sub(r":(?:\w+:)?\w+:`~?\.?([^`]+)`", lambda role: f"`{role[1].rpartition('.')[2]}`", text)
    if names:
        name = "(?:" + "|".join(sorted(map(re.escape, names), key=len, reverse=True)) + ")"
        told = re.compile(rf"(?:(?<=[.;)]) |(?<=[.;)])\n|^)({name}(?:, {name})*):\s", re.M)
        parts = [told.sub(r"\n- **\1**: ", p) if told.match(p) else p for p in re.split(r"\n\s*\n", text)]
        text = "\n\n".join(parts)
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        code = line.lstrip().startswith((">>>", "..."))
        if code != inside:
            lines.append("\n```python" if code else "```\n")
            inside = code
        lines.append(line.lstrip()[4:].removesuffix("# doctest: +SKIP").rstrip() if code else line)
    return "\n".join([*lines, "```"] if inside else lines)


class Docstrings(griffe.Extension):
    """For mkdocstrings (mkdocs.yml)."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            names = [p.name for p in obj.parameters] if obj.is_function else []
            names = [m.name for m in obj.members.values() if m.is_attribute] if obj.is_class else names
            obj.docstring.value = as_markdown(obj.docstring.value, [n for n in names if n not in ("self", "cls")])
