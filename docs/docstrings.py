"""Docstrings as Markdown for the API pages: Sphinx roles become code, doctest lines a block of Python."""

from __future__ import annotations

import re
from typing import Any

import griffe


def as_markdown(text: str) -> str:
    text = re.sub(r":(?:\w+:)?\w+:`~?\.?([^`]+)`", lambda role: f"`{role[1].rpartition('.')[2]}`", text)
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
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
