"""`quantlens predict`: what an exported model, or a detector, says of pictures."""

import io
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _common, _options
from quantlens.errors import BadImageError, QuantlensWarning, UnsupportedError

HELP = """Label pictures with an exported model and say whether each looks unknown; or find objects with a detector.

The file of a classifier carries its preprocessing, class names, OOD score and threshold (`quantlens export
--guard-images`). A detector may be an exported file too, a quantized checkpoint, or the name of a model: its boxes are
in pixels of the picture, and --out draws them. A picture that cannot be read is named, the others are done, and the
exit code is 1.

[bold]Examples[/bold]

    quantlens predict digits.onnx photo.jpg scan.png

    quantlens predict digits.xml --json *.png > predictions.json

    quantlens predict scenes-detr photo.png --out drawn

    quantlens predict detr-w8a8.safetensors *.jpg --threshold 0.7 --json
"""


def predict(
    artefact: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A file (.onnx, .xml, .pt2); a detector's checkpoint or name."),
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="Pictures.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw what a detector finds, one PNG for each picture.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Objects with at least this score (of a detector).")
    ] = 0.5,
    letterbox: _options.Letterbox = False,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per run.")] = 16,
) -> None:
    """See HELP."""
    model = _opened(artefact, threads, letterbox)
    detects = model.task == "detect"
    if out is not None and not detects:
        raise UnsupportedError(f"{artefact} finds no boxes to draw: its task is {model.task!r}; leave --out out")
    found: dict[Path, Any] = {}  # a prediction, or why there is none
    drawn: dict[Path, Path] = {}
    for start in range(0, len(images), batch_size):
        part = {image: _read(image) for image in images[start : start + batch_size]}
        good = {image: picture for image, picture in part.items() if not isinstance(picture, str)}
        if detects:
            from quantlens.evaluation.objects import find_objects

            predictions: Any = find_objects(model, list(good.values()), threshold=threshold)
        else:
            predictions = model.predict(list(good.values())) if good else []
        found |= part | dict(zip(good, predictions, strict=True))
        if out is not None:
            for image, picture in good.items():
                drawn[image] = _draw(picture, found[image], out, image, drawn)
    bad = [image for image in images if isinstance(found[image], str)]
    good_ones = [image for image in images if image not in bad]
    heads, rows = _objects(good_ones, found) if detects else _labels(model, good_ones, found)
    data = [{"image": str(i), **_data(found[i]), **({"drawn": str(drawn[i])} if i in drawn else {})} for i in images]
    _common.show([_common.table(heads, rows)], data, "-" if json else None, "the predictions")
    if not json and out is not None:
        print(f"drawn: {len(drawn)} picture{'' if len(drawn) == 1 else 's'} in {out}")
    if not json and not detects and model.guard["threshold"] is None:
        print("the file has no threshold; export it with --guard-images to be told what looks unknown")
    if bad:
        raise typer.Exit(1)


def _opened(name: str, threads: int | None, letterbox: bool) -> Any:
    if not letterbox and Path(name).suffix in (".onnx", ".xml", ".pt2"):
        from quantlens.export.exported import Artefact

        return Artefact(Path(name), threads=threads)
    import torch

    from quantlens.evaluation.open_models import measurable, open_models

    if threads is not None:
        torch.set_num_threads(threads)
    model = measurable(open_models(name, letterbox=letterbox)[0])
    if getattr(model, "task", None) != "detect":
        raise UnsupportedError(
            f"{name} is no detector; export it (`quantlens export`) and give the file, which carries its names of "
            "classes and what tells an unknown image"
        )
    return model


def _read(image: Path) -> Any:
    """A picture, or why it cannot be read, which is said."""
    from quantlens.data import decode_image

    try:
        return decode_image(image)
    except BadImageError as error:
        warnings.warn(f"{image}: {error}", QuantlensWarning, stacklevel=2)
        return f"{image}: {error}"


def _draw(picture: Any, objects: Any, folder: Path, image: Path, taken: dict[Path, Path]) -> Path:
    """The picture with its boxes as a PNG file in the folder; a number tells pictures of one name apart."""
    from quantlens.files import write_whole
    from quantlens.plots.boxes import draw_boxes

    texts = [f"{one.label} {one.score:.2f}" for one in objects]
    stream = io.BytesIO()
    draw_boxes(picture, [one.box for one in objects], texts).save(stream, "PNG")
    names = (f"{image.stem}{f'-{k}' if k > 1 else ''}.png" for k in range(1, len(taken) + 2))
    path = next(folder / name for name in names if folder / name not in taken.values())
    return write_whole(path, stream.getvalue(), what="the picture")


def _data(found: Any) -> dict[str, Any]:
    if isinstance(found, str):
        return {"error": found}
    return {"objects": [one._asdict() for one in found]} if isinstance(found, list) else found._asdict()


def _objects(images: list[Path], found: dict[Path, Any]) -> tuple[list[str], list[Any]]:
    rows = []
    for image in images:
        for k, one in enumerate(found[image]):
            box = ", ".join(f"{value:.1f}" for value in one.box)
            rows.append(("" if k else str(image), one.label, f"{one.score:.3f}", box))
        if not found[image]:
            rows.append((str(image), "–", "–", "–"))
    return ["image", "label", "score", "box: x1, y1, x2, y2"], rows


def _labels(model: Any, images: list[Path], found: dict[Path, Any]) -> tuple[list[str], list[Any]]:
    rows = [
        (
            str(image),
            p.name or str(p.label),
            f"{100 * p.probability:.1f} %",
            "–" if p.score is None else f"{p.score:.3f}",
            "–" if p.unknown is None else "unknown" if p.unknown else "known",
        )
        for image, p in ((image, found[image]) for image in images)
    ]
    return ["image", "label", "probability", f"{model.guard['score'] or 'no'} score", "looks"], rows
