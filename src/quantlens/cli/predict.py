"""`quantlens predict`: what an exported model says of pictures, and whether they look unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantlens.cli._common import command

HELP = """Label pictures with an exported model, and say whether each looks unknown.

The file carries its preprocessing, class names, OOD score and threshold (`quantlens export --guard-images`).

[bold]Examples[/bold]

    quantlens predict digits.onnx photo.jpg scan.png

    quantlens predict digits.xml --json *.png > predictions.json
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "predict", HELP, predict)


def predict(
    artefact: Annotated[Path, typer.Argument(metavar="FILE", help="An exported model: .onnx or .xml.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="Pictures.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per run.")] = 16,
) -> None:
    """See HELP."""
    from quantlens.cli import _common
    from quantlens.export.exported import Artefact

    model = Artefact(artefact, threads=threads)
    found = []
    for start in range(0, len(images), batch_size):
        found += model.predict(images[start : start + batch_size])
    if json:
        import json as standard

        rows = [{"image": str(i), **p._asdict()} for i, p in zip(images, found, strict=True)]
        print(standard.dumps(rows, indent=1))
        return
    from rich.table import Table

    table = Table()
    for column in ("image", "label", "probability", f"{model.guard['score']} score", "looks"):
        table.add_column(column, overflow="fold")
    for image, p in zip(images, found, strict=True):
        looks = "–" if p.unknown is None else "unknown" if p.unknown else "known"
        table.add_row(str(image), p.name or str(p.label), f"{100 * p.probability:.1f} %", f"{p.score:.3f}", looks)
    _common.stdout().print(table)
    if model.guard["threshold"] is None:
        _common.say("the file has no threshold; export it with --guard-images to be told what looks unknown")
