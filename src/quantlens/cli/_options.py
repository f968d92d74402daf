"""Arguments and options that several commands have, under one wording."""

from __future__ import annotations

from typing import Annotated

import typer

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.")]
Weights = Annotated[
    str | None,
    typer.Option(metavar="W", help="A checkpoint file, [bold]pretrained[/bold] (the default) or random."),
]
CalibrationSource = Annotated[str, typer.Option(metavar="SOURCE", help="Calibration images (`quantlens sources`).")]
CalibrationCount = Annotated[
    int | None, typer.Option("--n", min=1, help="How many calibration images the seed draws (default: 32).")
]
MethodName = Annotated[str, typer.Option(help="The method (`quantlens methods`).")]
MethodOptions = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the method.")
]
Seed = Annotated[int, typer.Option(min=0, help="Draws the calibration images, and all else that is random.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read, and say how many.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Do not keep decoded images on disk.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE_OR_MODULE",
        help="Load methods, formats, scores and transforms of your own (docs/extending.md); may be repeated.",
    ),
]
