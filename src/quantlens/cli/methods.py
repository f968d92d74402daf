"""`quantlens methods`: what the registry holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quantlens.cli._common import command

HELP = """List the quantization methods, or show one in full.

With a NAME: its paper, its options with their defaults, and where it departs from the paper. Methods of plugins are
listed too, with the plugin beside them.

[bold]Examples[/bold]

    quantlens methods

    quantlens methods repq-vit

    quantlens methods --plugin my_method.py
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "methods", HELP, methods)


def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this method in full.")] = None,
) -> None:
    """See HELP."""
    from rich.markup import escape
    from rich.table import Table

    from quantlens.cli import _common
    from quantlens.methods import registry

    if name is not None:
        _one(registry.get(name), registry.place(name))
        return
    table = Table(title="Methods (`quantlens methods NAME` shows the options)", title_justify="left")
    found = registry.available()
    places = [escape(registry.place(name)) for name in found]
    for column in ("name", "also", "quantizes", "paper", *(["plugin"] if any(places) else [])):
        table.add_column(column, overflow="fold")
    for info, place in zip(found.values(), places, strict=True):
        row = (info.name, ", ".join(info.aliases) or "–", info.quantizes, _paper(info))
        table.add_row(*row, *([place] if any(places) else []))
    _common.stdout().print(table)


def _paper(info: Any) -> str:
    if not info.paper:
        return info.title or "–"
    return ", ".join(part for part in (info.paper, info.venue, str(info.year or "")) if part)


def _one(method: Any, place: str) -> None:
    from rich.table import Table

    from quantlens.cli import _common

    info = method.info
    _common.say(f"{info.name}: {info.title}")
    _common.say(f"paper: {_paper(info)} {info.url}".rstrip())
    if place:
        _common.say(f"plugin: {place}")
    _common.say(f"quantizes: {info.quantizes}")
    _common.say(info.summary)
    for departure in info.departures:
        _common.say(f"departs from it: {departure}")
    table = Table(title="Options (--option KEY=VALUE)", title_justify="left")
    for column in ("option", "default", "meaning", "choices"):
        table.add_column(column, overflow="fold")
    from quantlens.methods.base import SHARED_OPTIONS

    for key, option in {**SHARED_OPTIONS, **info.options}.items():
        choices = ", ".join(map(str, option.choices)) if option.choices else ""
        table.add_row(key, str(option.default), option.help, choices)
    _common.stdout().print(table)
