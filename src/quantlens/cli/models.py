"""`quantlens models`: names that MODEL may be."""

from __future__ import annotations

from typing import Annotated

import typer

from quantlens.cli._common import command

HELP = """List the models that ship with quantlens, and say how models of timm are named.

A tag after a dot chooses the weights of the hub: vit_small_patch16_224.augreg_in21k_ft_in1k. Your own weights are given
with --weights FILE (.safetensors, .pth, .pt, or .npz of AugReg).

[bold]Examples[/bold]

    quantlens models

    quantlens models --filter 'deit*_small*'

    quantlens models --filter 'swin_tiny*' --tags
"""

EXAMPLES = (
    "deit_tiny_patch16_224",
    "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "deit3_small_patch16_224.fb_in22k_ft_in1k",
    "swin_tiny_patch4_window7_224.ms_in1k",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "models", HELP, models, plugins=False)


def models(
    filter: Annotated[
        str | None, typer.Option("--filter", metavar="PATTERN", help="Names of timm that match, such as 'vit*'.")
    ] = None,
    tags: Annotated[bool, typer.Option("--tags", help="With --filter: names with the tags of their weights.")] = False,
) -> None:
    """See HELP."""
    from quantlens import zoo
    from quantlens.cli import _common

    if filter is not None:
        import timm

        from quantlens.errors import QuantlensError

        found = [name for name in zoo.available() if _matches(name, filter)]
        found += timm.list_models(filter, pretrained=tags)
        if not found:
            raise QuantlensError(f"no model matches {filter!r}; try a wider pattern, such as '*{filter.strip('*')}*'")
        for name in found:
            _common.say(name)
        return
    from rich.table import Table

    table = Table(title="Models that ship with quantlens", title_justify="left")
    table.add_column("name")
    table.add_column("what it is", overflow="fold")
    for name, entry in zoo.available().items():
        table.add_row(name, str(getattr(entry, "description", "") or getattr(entry, "summary", "")))
    _common.stdout().print(table)
    _common.say("Any vision transformer of timm by its name, with or without the tag of its weights:")
    for example in EXAMPLES:
        _common.say(f"  {example}")
    _common.say("`quantlens models --filter 'vit*'` lists names; add --tags for the weights of the hub.")


def _matches(name: str, pattern: str) -> bool:
    from fnmatch import fnmatch

    return fnmatch(name, pattern)
