"""`quantlens allocate`: a width for the attention and the MLP of every block, under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _options
from quantlens.cli._common import command

HELP = """Choose bit widths for mixed precision: how sensitive every attention and every MLP is, and the widths of least
total sensitivity within a budget, exactly.

The budget is the size of a uniform model ([bold]--target W6A6[/bold]), or a size or a number of bit operations of your
own. The file goes into `quantlens quantize --bits alloc.json`, with any method.

[bold]Examples[/bold]

    quantlens allocate digits-vit --calibration embedded:digits-calibration \\
      --target W6A6 --front --out alloc.json

    quantlens allocate deit_tiny_patch16_224 --weights deit_tiny.safetensors \\
      --calibration imagenet:train --sensitivity kl --size-mb 4.0

    quantlens quantize digits-vit --method easyquant --bits alloc.json \\
      --calibration embedded:digits-calibration
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "allocate", HELP, allocate)


def allocate(
    model: _options.ModelName,
    calibration: _options.CalibrationSource,
    weights: _options.Weights = None,
    n: _options.CalibrationCount = None,
    sensitivity: Annotated[
        str, typer.Option(help="[bold]nuclear-norm[/bold], hessian, kl or random.")
    ] = "nuclear-norm",
    target: Annotated[
        str, typer.Option(help="The uniform model whose cost is the budget; also the width outside the blocks.")
    ] = "W6A6",
    bops_target: Annotated[
        bool, typer.Option("--bops-of-target", help="The budget is the target's bit operations, not its size.")
    ] = False,
    size_mb: Annotated[
        float | None, typer.Option(min=0, metavar="MB", help="A budget of your own: megabytes (10⁶ bytes).")
    ] = None,
    bops: Annotated[
        float | None, typer.Option(min=0, metavar="N", help="A budget of your own: bit operations of one image (7e9).")
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Widths to choose from (default: target − 2 … target + 2).")
    ] = None,
    front: Annotated[
        bool, typer.Option("--front", help="Keep the whole Pareto front, and plot it in front.html beside the file.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("alloc.json"),
    seed: _options.Seed = 0,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the sensitivity (probes=32)."),
    ] = None,
    device: _options.Device = "auto",
    skip_bad: _options.SkipBad = False,
    no_cache: _options.NoCache = False,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.cli import _common
    from quantlens.cli.quantize import drawn
    from quantlens.errors import QuantlensError, UnknownNameError
    from quantlens.evaluation.environment import choose_device

    settings = _common.settings(option)
    widths = _common.whole_numbers([candidates] if candidates else None, "--candidates")
    if size_mb is not None and bops is not None:
        raise QuantlensError("--size-mb and --bops are two budgets; give one of them")
    if size_mb is not None and bops_target:
        raise QuantlensError("--size-mb and --bops-of-target are two budgets; give one of them")
    from quantlens.allocation import SENSITIVITIES, parse_target, sensitivity_options
    from quantlens.allocation.quantizing import allocate as choose_widths
    from quantlens.data import as_image_set, open_source
    from quantlens.models import load_model

    if sensitivity not in SENSITIVITIES:
        raise UnknownNameError("sensitivity", sensitivity, SENSITIVITIES)
    sensitivity_options(sensitivity, settings)
    parse_target(target)
    source = open_source(drawn(calibration, n, seed))
    with _common.stages(quiet) as step:
        loaded = load_model(model, _common.weights_argument(weights), device=choose_device(device))
        images = as_image_set(
            source,
            loaded.preprocess,
            cache_dir=_common.cache_argument(no_cache),
            skip_bad=skip_bad,
            progress=lambda done, total: step("decoding calibration images", done, total),
        )
        found = choose_widths(
            loaded,
            images,
            target,
            sensitivity=sensitivity,
            cost="bops" if bops is not None or bops_target else "size",
            budget=bops if size_mb is None else size_mb * 1e6,
            candidates=widths,
            front=front,
            seed=seed,
            progress=lambda done, total: step(f"sensitivity by {sensitivity}", done, total),
            **settings,
        )
    found.save(out)
    _common.stdout().print(table(found))
    if front:
        from quantlens.report.frontier import write_front

        page = write_front(found, out.with_name("front.html"))
        _common.say(f"{page}: the front, {len(found.front)} points")
    _common.say(f"{out}: {found.model} {found.name}, {figures(found)}")


def table(allocation: Any) -> Any:
    """A row per block: the widths of its attention and its MLP, and their sensitivities at the chosen width."""
    from rich.table import Table

    grid = Table(title=f"{allocation.model} {allocation.name}", box=None, pad_edge=False)
    grid.add_column("group")
    for name in ("bits", "sensitivity", "kB", "share of BOPs"):
        grid.add_column(name, justify="right")
    whole = allocation.cost_of("bops")
    for group in allocation.groups:
        grid.add_row(
            group.name,
            str(group.bits),
            f"{group.sensitivity[group.bits]:.3g}",
            f"{group.size[group.bits] / 1e3:.1f}",
            f"{group.bops[group.bits] / whole:.1%}",
        )
    return grid


def figures(allocation: Any) -> str:
    """Size, bit operations and sensitivity, against the uniform model."""
    size, work = allocation.cost_of("size") / 1e6, allocation.cost_of("bops") / 1e9
    text = f"{size:.2f} MB, {work:.2f} G bit operations"
    if allocation.target in allocation.candidates:
        width, loss = allocation.target, allocation.loss_of(allocation.target)
        uniform_size, uniform_work = (allocation.cost_of(kind, width) for kind in ("size", "bops"))
        text += f" (W{width}A{width}: {uniform_size / 1e6:.2f} MB, {uniform_work / 1e9:.2f} G)"
        if loss > 0:
            text += f", {allocation.loss / loss:.3f} of its sensitivity"
    return f"{text}; {allocation.sensitivity} in {allocation.seconds:.1f} s"
