"""`quantlens recommend`: which method and bits to take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlens.cli import _common, _options
from quantlens.errors import QuantlensError
from quantlens.files import check_writable

if TYPE_CHECKING:
    from quantlens.studies.recommend import Recommendation, Trial

HELP = """Find the smallest and the fastest setting whose loss of top-1, of a detector of mAP, is within a budget.

Methods are tried from the fastest to the slowest to calibrate and bits from 8 downwards, each on the same labelled
images as the FP32 model (of a detector: with boxes); nothing more is tried after [bold]--minutes[/bold]. The fastest is
timed as an exported file beside the FP32 one. Shown are all settings that were tried, the change of each with an
interval (those of settings that were measured on all images hold jointly), and the command for each of the two.

[bold]Examples[/bold]

    quantlens recommend digits-vit --id embedded:digits-test \\
      --ood letters=embedded:letters --max-loss 1pt

    quantlens recommend scenes-detr --id embedded:scenes \\
      --calibration embedded:scenes-calibration --max-loss 2pt

    quantlens recommend deit_tiny_patch16_224 --weights deit_tiny.safetensors \\
      --id imagenet:val --calibration imagenet:train --max-loss 0.5pt --minutes 60
"""


def recommend(
    model: _options.ModelName,
    id: Annotated[str, typer.Option("--id", metavar="SOURCE", help="Labelled images (`quantlens sources`).")],
    weights: _options.Weights = None,
    input_size: _options.InputSize = None,
    letterbox: _options.Letterbox = False,
    max_loss: Annotated[
        str, typer.Option(metavar="LOSS", help="Points of top-1 or mAP that may be lost: 1pt, or 0.01.")
    ] = "1pt",
    ood: _options.OodSets = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Calibration images (default: 32 of --id, then not measured on; none: made ones)."
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(help="Time files for openvino-cpu, onnxruntime-cpu, what suits this processor (auto), or none."),
    ] = "auto",
    methods: Annotated[
        str, typer.Option(metavar="NAMES", help="What is tried, the fastest to calibrate first.")
    ] = "repq-vit,quantlens-fast,quantlens-best",
    minutes: Annotated[float, typer.Option(min=0, help="Nothing more is tried after this time.")] = 15,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON; - is stdout.")
    ] = None,
    seed: _options.Seed = 0,
    device: _options.Device = "auto",
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.evaluation.open_models import open_float
    from quantlens.studies.recommend import recommend as search

    if json != "-":
        check_writable(json)
    settings: dict[str, Any] = {"max_loss": read_loss(max_loss), "ood": _common.pairs(ood, "--ood")}
    settings |= {"calibration": calibration, "target": None if target == "none" else target, "minutes": minutes}
    settings |= {"methods": _common.names([methods]), "seed": seed}
    if not quiet:
        _common.console(stderr=True).print(f"trying settings for at most {minutes:g} minutes")
    with _common.stages(quiet) as step:
        loaded = open_float(model, weights, device, input_size, letterbox=letterbox)
        found = search(loaded, id, progress=step, **settings)
    _common.show(_parts(found), found.to_dict(), json, "the recommendation")


def read_loss(text: str) -> float:
    """``1pt``, ``1%`` or ``0.01`` as a fraction. Raises QuantlensError."""
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*(pt|pts|%)?\s*", text)
    if not found:
        raise QuantlensError(f"--max-loss {text!r}: write points of top-1 or mAP (1pt), or a fraction (0.01)")
    return float(found[1]) / (100 if found[2] else 1)


def _parts(found: Recommendation) -> Iterator[Any]:
    """The settings that were tried, then the two that are recommended."""
    from quantlens.metrics import METRICS

    metric = METRICS[found.metric]
    sets = list(dict.fromkeys(name for trial in found.trials for name in trial.ood))
    others = [METRICS[name] for name in dict.fromkeys(name for trial in found.trials for name in trial.others)]
    change = [metric.title, "95 % interval", *(one.title for one in others), *(f"AUPR-out {name}" for name in sets)]
    numbers = ["images", *change, "MB", "ms", "inside"]
    heads = ["method", "bits", "target", *numbers]
    fp32 = f"{metric.title} {metric.text(found.fp32)} at FP32"
    title = f"{found.model}: {fp32} on {found.n} images; changes are quantized − FP32"
    rows = [_row(trial, others, sets) for trial in found.trials]
    yield _common.table(heads, rows, right=numbers, whole=heads, title=title, box=None, pad_edge=False)
    for what, one in (("smallest", found.smallest), ("fastest", found.fastest)):
        if one is not None:
            speed = "" if one.milliseconds is None else f", {one.milliseconds:.2f} ms an image"
            loss = f"{metric.title} {_points(one.change)} ({_interval(one)})"
            yield f"{what}: {one.method} {one.bits}, {one.size_mb:.2f} MB{speed}, {loss}\n  {one.command}"
    yield from found.notes


def _row(trial: Trial, others: list[Any], sets: list[str]) -> list[str]:
    ood = [_points(trial.ood[name]) if name in trial.ood else "" for name in sets]
    speed = "" if trial.milliseconds is None else f"{trial.milliseconds:.2f}"
    more = [metric.text(trial.others.get(metric.name), "+") for metric in others]
    change = [str(trial.n), _points(trial.change), _interval(trial), *more, *ood]
    size = [f"{trial.size_mb:.2f}", speed, "yes" if trial.inside else "no"]
    return [trial.method, trial.bits, trial.target or "", *change, *size]


def _interval(trial: Trial) -> str:
    return f"{_points(trial.low)} … {_points(trial.high)}"


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.2f}"
