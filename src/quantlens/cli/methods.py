"""`quantlens methods`: what the registry holds."""

from json import dumps
from typing import Annotated, Any

import typer

from quantlens.cli import _common

HELP = """List the quantization methods, or show one in full.

With a NAME: its paper, its options with their defaults, and where it departs from the paper; `--option variant=paper`
undoes every departure. Methods of plugins are listed too, with the plugin beside them.

[bold]Examples[/bold]

    quantlens methods

    quantlens methods repq-vit

    quantlens methods --json

    quantlens methods --plugin my_method.py
"""


def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this method in full.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all that is known of the methods as JSON.")] = False,
) -> None:
    """See HELP."""
    from quantlens.methods import registry

    found = registry.available() if name is None else {name: registry.get(name).info}
    if json:
        known = [info.to_dict() for info in found.values()]
        print(dumps(known if name is None else known[0], indent=1, ensure_ascii=False))
    elif name is not None:
        _show(found[name], registry.place(name))
    else:
        heads = ["name", "also", "quantizes", "paper", "plugin"]
        rows = [
            (info.name, ", ".join(info.aliases) or "–", info.quantizes, info.citation, registry.place(name))
            for name, info in found.items()
        ]
        columns = 5 if any(row[-1] for row in rows) else 4
        title = "Methods (`quantlens methods NAME` shows the options)"
        _common.console().print(_common.table(heads[:columns], [row[:columns] for row in rows], title=title))


def _show(info: Any, place: str) -> None:
    print(f"{info.name}: {info.title}")
    print(f"paper: {info.citation} {info.url}".rstrip())
    if place:
        print(f"plugin: {place}")
    print(f"quantizes: {info.quantizes}{', to floating-point formats too' * info.floating}")
    print(info.summary)
    for departure in info.departures:
        values = f"{departure.setting}={departure.ours}, the paper's form {departure.paper}"
        print(f"departs from its paper: {departure.what} ({values})")
    for reading in info.readings:
        print(f"reads it so: {reading}")
    for title, options in (
        ("Options (--option KEY=VALUE)", info.options),
        ("What every method takes (--patch-bits …)", info.shared),
    ):
        rows = [
            (key, str(option.default), option.help, ", ".join(map(str, option.choices or ())))
            for key, option in options.items()
        ]
        if rows:
            heads = ["option", "default", "meaning", "choices"]
            _common.console().print(_common.table(heads, rows, title=title))
