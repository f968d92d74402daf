"""`quantlens sources`: how images are named on the command line and in study files."""

from __future__ import annotations

import typer

from quantlens.cli._common import command

HELP = """Explain how images are named (SOURCE), and list the sets that ship with the package.

Wherever a command or a study file takes a SOURCE, it is written as shown here.

[bold]Examples[/bold]

    quantlens sources
"""

GRAMMAR = (
    ("KIND:PATH", "all images, in the sorted order of their names"),
    ("KIND:PATH[a:b]", "images a to b of that order (b excluded), as Python slices: [:100], [-50:]"),
    ("KIND:PATH[a:b:s]", "every s-th of them: [::2] and [1::2] are two halves that share no image"),
    ("KIND:PATH?n=200&seed=0", "a random sample of 200, drawn with the seed"),
    ("KIND:PATH[0:1000]?n=32&seed=0", "a random sample from a slice"),
    ("KIND:PATH/", "a folder whose name ends like one of these: what stands before a slash is its name"),
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "sources", HELP, sources, plugins=False)


def sources() -> None:
    """See HELP."""
    from rich.table import Table

    from quantlens.cli import _common
    from quantlens.data import available_embedded, available_sources

    console = _common.stdout()
    grammar = Table(title="A SOURCE is", title_justify="left")
    grammar.add_column("written")
    grammar.add_column("meaning", overflow="fold")
    for written, meaning in GRAMMAR:
        grammar.add_row(written, meaning)
    console.print(grammar)
    kinds = Table(title="Kinds", title_justify="left")
    kinds.add_column("kind")
    kinds.add_column("images", overflow="fold")
    for name, kind in available_sources().items():
        kinds.add_row(f"{name}:{kind.what.upper()}", kind.description)
    console.print(kinds)
    embedded = Table(title="Sets that ship with quantlens", title_justify="left")
    for column in ("source", "group", "images"):
        embedded.add_column(column, overflow="fold")
    for name, info in available_embedded().items():
        embedded.add_row(f"embedded:{name}", info.group, info.description)
    console.print(embedded)
    _common.say("On a command line, put a SOURCE with [ ] or ? in quotes: 'imagenet:val[0:400]'.")
