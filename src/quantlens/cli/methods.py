"""`quantlens methods`: what the registry holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quantlens.cli._common import command

HELP = """List the quantization methods, or show one in full.

With a NAME: its paper, its options with their defaults, and where it departs from the paper; `--option variant=paper`
undoes every departure. Methods of plugins are listed too, with the plugin beside them.

[bold]Examples[/bold]

    quantlens methods

    quantlens methods repq-vit

    quantlens methods --json

    quantlens methods --plugin my_method.py
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "methods", HELP, methods)


Json = Annotated[bool, typer.Option("--json", help="Print all that is known of the methods as JSON.")]


def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this method in full.")] = None,
    json: Json = False,
) -> None:
    """See HELP."""
    from rich.markup import escape
    from rich.table import Table

    from quantlens.cli import _common
    from quantlens.methods import registry

    found = registry.available() if name is None else {name: registry.get(name).info}
    if json:
        import json as standard

        known = [info.to_dict() for info in found.values()]
        _common.say(standard.dumps(known if name is None else known[0], indent=1, ensure_ascii=False))
        return
    if name is not None:
        _one(found[name], registry.place(name))
        return
    table = Table(title="Methods (`quantlens methods NAME` shows the options)", title_justify="left")
    places = [escape(registry.place(name)) for name in found]
    for column in ("name", "also", "quantizes", "paper", *(["plugin"] if any(places) else [])):
        table.add_column(column, overflow="fold")
    for info, place in zip(found.values(), places, strict=True):
        row = (info.name, ", ".join(info.aliases) or "–", info.quantizes, info.citation)
        table.add_row(*row, *([place] if any(places) else []))
    _common.stdout().print(table)


def _one(info: Any, place: str) -> None:
    from rich.table import Table

    from quantlens.cli import _common

    _common.say(f"{info.name}: {info.title}")
    _common.say(f"paper: {info.citation} {info.url}".rstrip())
    if place:
        _common.say(f"plugin: {place}")
    _common.say(f"quantizes: {info.quantizes}")
    _common.say(info.summary)
    for departure in info.departures:
        values = f"{departure.setting}={departure.ours}, the paper's form {departure.paper}"
        _common.say(f"departs from its paper: {departure.what} ({values})")
    for reading in info.readings:
        _common.say(f"reads it so: {reading}")
    for title, options in (
        ("Options (--option KEY=VALUE)", info.options),
        ("What every method takes (--patch-bits …)", info.shared),
    ):
        table = Table(title=title, title_justify="left")
        for column in ("option", "default", "meaning", "choices"):
            table.add_column(column, overflow="fold")
        for key, option in options.items():
            choices = ", ".join(map(str, option.choices)) if option.choices else ""
            table.add_row(key, str(option.default), option.help, choices)
        if options:
            _common.stdout().print(table)
