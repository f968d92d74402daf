"""`quantlens recommend`: which method and bits to take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _options
from quantlens.cli._common import command

HELP = """Find the smallest and the fastest setting whose loss of top-1 is within a budget.

Methods are tried from the cheapest to the dearest and bits from 8 downwards, each on the same labelled images as the
FP32 model; nothing more is tried after [bold]--minutes[/bold]. The fastest is timed as an exported file beside the FP32
one. Shown are all settings that were tried, the change of each with an interval that holds for all of them at once, and
the commands that make the two.

[bold]Examples[/bold]

    quantlens recommend digits-vit --id embedded:digits-test \\
      --ood letters=embedded:letters --max-loss 1pt

    quantlens recommend deit_tiny_patch16_224 --weights deit_tiny.safetensors \\
      --id imagenet:val --calibration imagenet:train --max-loss 0.5pt --minutes 60
"""

MaxLoss = Annotated[str, typer.Option(metavar="LOSS", help="Points of top-1 that may be lost: 1pt, or 0.01.")]
Calibration = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Calibration images (default: 32 of --id, which are then not measured on)."),
]
Target = Annotated[
    str,
    typer.Option(help="Time files for openvino-cpu, onnxruntime-cpu, what suits this processor (auto), or none."),
]
Methods = Annotated[str, typer.Option(metavar="NAMES", help="What is tried, the cheapest first.")]
Minutes = Annotated[float, typer.Option(min=0, help="Nothing more is tried after this time.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "recommend", HELP, recommend)


def recommend(
    model: _options.ModelName,
    id: Annotated[str, typer.Option("--id", metavar="SOURCE", help="Labelled images (`quantlens sources`).")],
    weights: _options.Weights = None,
    max_loss: MaxLoss = "1pt",
    ood: _options.OodSets = None,
    calibration: Calibration = None,
    target: Target = "auto",
    methods: Methods = "repq-vit,quantlens-fast,quantlens-best",
    minutes: Minutes = 15,
    json: Json = None,
    seed: _options.Seed = 0,
    device: _options.Device = "auto",
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from json import dumps

    from quantlens.cli import _common
    from quantlens.evaluation.environment import choose_device
    from quantlens.evaluation.open_models import weights_named
    from quantlens.files import check_writable, write_whole
    from quantlens.studies.recommend import recommend as search

    check_writable(json)
    settings: dict[str, Any] = {"max_loss": read_loss(max_loss), "ood": _common.pairs(ood, "--ood", "NAME=SOURCE")}
    settings |= {"calibration": calibration, "target": None if target == "none" else target, "minutes": minutes}
    settings |= {"methods": _common.names([methods]), "weights": weights_named(weights)}
    if not quiet:
        _common.say(f"trying settings for at most {minutes:g} minutes")
    with _common.stages(quiet) as step:
        found = search(model, id, seed=seed, progress=step, device=choose_device(device), **settings)
    _show(found)
    if json is not None:
        write_whole(json, dumps(found.to_dict(), indent=1, allow_nan=False) + "\n", what="the recommendation")
        _common.say(f"written: {json}")


def read_loss(text: str) -> float:
    """``1pt``, ``1%`` or ``0.01`` as a fraction. Raises QuantlensError."""
    from quantlens.errors import QuantlensError

    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*(pt|pts|%)?\s*", text)
    if not found:
        raise QuantlensError(f"--max-loss {text!r}: write points of top-1, such as 1pt, or a fraction, such as 0.01")
    return float(found[1]) / (100 if found[2] else 1)


def _show(found: Any) -> None:
    """The settings that were tried, then the two that are recommended."""
    from rich.table import Table

    from quantlens.cli import _common

    sets = list(found.trials[0].ood) if found.trials else []
    title = f"{found.model}: top-1 {100 * found.top1:.2f} at FP32 on {found.n} images; changes are quantized − FP32"
    table = Table(title=title, box=None, pad_edge=False)
    for name in ("method", "bits", "target"):
        table.add_column(name)
    for name in ("images", "top-1", "95 % interval", "NLL", *(f"AUPR-out {s}" for s in sets), "MB", "ms", "inside"):
        table.add_column(name, justify="right")
    for trial in found.trials:
        interval = f"{100 * trial.low:+.2f} … {100 * trial.high:+.2f}"
        ms = "" if trial.milliseconds is None else f"{trial.milliseconds:.2f}"
        out = [f"{100 * trial.ood[s]:+.2f}" if s in trial.ood else "" for s in sets]
        change = [str(trial.n), f"{100 * trial.change:+.2f}", interval, f"{trial.nll:+.3f}", *out]
        size = [f"{trial.size_mb:.2f}", ms, "yes" if trial.inside else "no"]
        table.add_row(trial.method, trial.bits, trial.target or "", *change, *size)
    _common.stdout().print(table)
    for what, one in (("smallest", found.smallest), ("fastest", found.fastest)):
        if one is not None:
            speed = "" if one.milliseconds is None else f", {one.milliseconds:.2f} ms an image"
            loss = f"top-1 {100 * one.change:+.2f} ({100 * one.low:+.2f} … {100 * one.high:+.2f})"
            _common.say(f"{what}: {one.method} {one.bits}, {one.size_mb:.2f} MB{speed}, {loss}")
            _common.say(f"  {one.command}")
    for note in found.notes:
        _common.say(note)
