"""`quantlens allocate`: a width for the attention and the MLP of every block, under a budget."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _common, _options
from quantlens.errors import QuantlensError
from quantlens.files import check_writable

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


def allocate(
    model: _options.ModelName,
    calibration: _options.CalibrationSource,
    weights: _options.Weights = None,
    input_size: _options.InputSize = None,
    letterbox: _options.Letterbox = False,
    n: _options.CalibrationCount = None,
    sensitivity: Annotated[
        str,
        typer.Option(
            help="[bold]nuclear-norm[/bold] (balanced; `-o formula=paper`: as published), hessian, kl or random."
        ),
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
        list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="For the sensitivity (probes=32).")
    ] = None,
    device: _options.Device = "auto",
    skip_bad: _options.SkipBad = False,
    no_cache: _options.NoCache = False,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens import api
    from quantlens.allocation import parse_target, sensitivity_options
    from quantlens.report.frontier import write_front

    check_writable(out, what="the allocation")
    how = sensitivity_options(sensitivity, _common.settings(option)) | _budget(bops_target, size_mb, bops)
    widths = _common.whole_numbers([candidates or ""], "--candidates") or None
    parse_target(target)
    with _common.stages(quiet) as step:
        reading = {"letterbox": letterbox, **_common.reading(skip_bad, no_cache)}
        loaded, images = _common.open_run(step, model, weights, device, calibration, n, seed, input_size, **reading)
        how |= {"sensitivity": sensitivity, "progress": partial(step, f"sensitivity by {sensitivity}")}
        found = api.allocate(loaded, images, target, candidates=widths, front=front, seed=seed, **how)
    found.save(out)
    _common.console().print(_table(found))
    if front:
        print(f"{write_front(found, out.with_name('front.html'))}: the front, {len(found.front)} points")
    print(f"{out}: {found.model} {found.name}, {_summary(found)}")


def _budget(bops_target: bool, size_mb: float | None, bops: float | None) -> dict[str, Any]:
    """The cost and the budget that three options name. Raises QuantlensError where they name two budgets."""
    for other, given in (("--bops", bops is not None), ("--bops-of-target", bops_target)):
        if size_mb is not None and given:
            raise QuantlensError(f"--size-mb and {other} are two budgets; give one of them")
    cost = "bops" if bops is not None or bops_target else "size"
    return {"cost": cost, "budget": bops if size_mb is None else size_mb * 1e6}


def _table(allocation: Any) -> Any:
    """A row per block: the widths of its attention and its MLP, and their sensitivities at the chosen width."""
    whole = allocation.cost_of("bops")
    rows = [
        (
            group.name,
            str(group.bits),
            f"{group.sensitivity[group.bits]:.3g}",
            f"{group.size[group.bits] / 1e3:.1f}",
            f"{group.bops[group.bits] / whole:.1%}",
        )
        for group in allocation.groups
    ]
    heads = ["group", "bits", "sensitivity", "kB", "share of BOPs"]
    title = f"{allocation.model} {allocation.name}"
    return _common.table(heads, rows, right=heads[1:], title=title, title_justify="center", box=None, pad_edge=False)


def _summary(allocation: Any) -> str:
    """Size, bit operations and sensitivity, against the uniform model; how the sensitivity was measured."""
    size, work = allocation.cost_of("size") / 1e6, allocation.cost_of("bops") / 1e9
    text = f"{size:.2f} MB, {work:.2f} G bit operations"
    if allocation.target in allocation.candidates:
        width, loss = allocation.target, allocation.loss_of(allocation.target)
        uniform_size, uniform_work = (allocation.cost_of(kind, width) for kind in ("size", "bops"))
        text += f" (W{width}A{width}: {uniform_size / 1e6:.2f} MB, {uniform_work / 1e9:.2f} G)"
        if loss > 0:
            text += f", {allocation.loss / loss:.3f} of its sensitivity"
    options = ", ".join(f"{key}={value}" for key, value in allocation.options.items())
    how = f"{allocation.sensitivity} ({options})" if options else allocation.sensitivity
    return f"{text}; {how} in {allocation.seconds:.1f} s"
