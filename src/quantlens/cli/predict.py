"""`quantlens predict`: what an exported model says of pictures, and whether they look unknown."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _common
from quantlens.errors import BadImageError, QuantlensWarning

HELP = """Label pictures with an exported model, and say whether each looks unknown.

The file carries its preprocessing, class names, OOD score and threshold (`quantlens export --guard-images`). A picture
that cannot be read is named, the others are labelled, and the exit code is 1.

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
    found: dict[Path, Any] = {}  # a prediction, or why there is none
    for start in range(0, len(images), batch_size):
        part = {image: _read(model, image) for image in images[start : start + batch_size]}
        good = {image: pixels for image, pixels in part.items() if not isinstance(pixels, str)}
        predictions = model.predict(list(good.values())) if good else []
        found |= part | dict(zip(good, predictions, strict=True))
    bad = [image for image in images if isinstance(found[image], str)]
    rows = [
        (
            str(image),
            p.name or str(p.label),
            f"{100 * p.probability:.1f} %",
            f"{p.score:.3f}",
            "–" if p.unknown is None else "unknown" if p.unknown else "known",
        )
        for image, p in ((image, found[image]) for image in images if image not in bad)
    ]
    heads = ["image", "label", "probability", f"{model.guard['score']} score", "looks"]
    data = [
        {"image": str(i), **({"error": found[i]} if isinstance(found[i], str) else found[i]._asdict())} for i in images
    ]
    _common.show([_common.table(heads, rows)], data, "-" if json else None, "the predictions")
    if not json and model.guard["threshold"] is None:
        print("the file has no threshold; export it with --guard-images to be told what looks unknown")
    if bad:
        raise typer.Exit(1)


def _read(model: Any, image: Path) -> Any:
    """The pixels of a picture, or why it cannot be read, which is said."""
    try:
        return model.pixels(image)
    except BadImageError as error:
        warnings.warn(str(error), QuantlensWarning, stacklevel=2)
        return str(error)
