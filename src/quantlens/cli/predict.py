"""`quantlens predict`: what an exported model says of pictures, and whether they look unknown."""

from pathlib import Path
from typing import Annotated

import typer

from quantlens.cli import _common

HELP = """Label pictures with an exported model, and say whether each looks unknown.

The file carries its preprocessing, class names, OOD score and threshold (`quantlens export --guard-images`).

[bold]Examples[/bold]

    quantlens predict digits.onnx photo.jpg scan.png

    quantlens predict digits.xml --json *.png > predictions.json
"""


def predict(
    artefact: Annotated[Path, typer.Argument(metavar="FILE", help="An exported model: .onnx or .xml.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="Pictures.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per run.")] = 16,
) -> None:
    """See HELP."""
    from quantlens.export.exported import Artefact

    model = Artefact(artefact, threads=threads)
    starts = range(0, len(images), batch_size)
    found = [p for start in starts for p in model.predict(images[start : start + batch_size])]
    rows = [
        (
            str(image),
            p.name or str(p.label),
            f"{100 * p.probability:.1f} %",
            f"{p.score:.3f}",
            "–" if p.unknown is None else "unknown" if p.unknown else "known",
        )
        for image, p in zip(images, found, strict=True)
    ]
    heads = ["image", "label", "probability", f"{model.guard['score']} score", "looks"]
    data = [{"image": str(image), **p._asdict()} for image, p in zip(images, found, strict=True)]
    _common.show([_common.table(heads, rows)], data, "-" if json else None, "the predictions")
    if not json and model.guard["threshold"] is None:
        print("the file has no threshold; export it with --guard-images to be told what looks unknown")
