"""`quantlens compare`: what changed between two models, methods or studies, and whether that is significant."""

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from quantlens.cli import _common, _options
from quantlens.errors import QuantlensError

HELP = """Compare two studies, two parts of a study, or two models, metric by metric, with intervals.

A and B are each DIR (the store of a study), DIR:key=value,… (cells of it; the keys are model, method, bits and seed,
and a key given twice takes either), FILE.npz of `evaluate --keep`, or FILE.json of `evaluate --json` (which has no
per-image outputs, so that only differences are shown), or a file of logits (.npz, .csv). With --id (and --ood) they may
be models, too, as `quantlens evaluate` takes them: names, checkpoints, exported or another tool's .onnx and .xml files;
they are measured on these images first.

Cells pair by model, method, bits and seed, but for what each side has one value of only, which is what is compared.
FP32 alone on one side pairs with every cell of its model. The interval is a paired bootstrap over the images, the same
for both, and over seeds: a difference whose interval holds 0 is no finding. `docs/compare.md` says how.

[bold]Examples[/bold]

    quantlens compare results:method=repq-vit,bits=W4A4 results:method=minmax,bits=W4A4

    quantlens compare results:bits=FP32 results:method=repq-vit

    quantlens compare before after --scores all --json changes.json

    quantlens compare one.npz other.npz

    quantlens compare digits-vit digits-w8a8.onnx --id embedded:digits-test \
      --ood letters=embedded:letters
"""


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="DIR, DIR:key=value,…, FILE.npz or FILE.json.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; differences are B less A.")],
    scores: Annotated[
        list[str] | None, typer.Option(metavar="NAMES", help="OOD scores, or all (default: msp, or the first kept).")
    ] = None,
    id: Annotated[str | None, typer.Option("--id", metavar="SOURCE", help="Images that models are run on.")] = None,
    ood: _options.OodSets = None,
    reference: _options.Reference = None,
    weights: _options.Weights = None,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resampling.")] = 0,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the comparison as JSON; - is stdout.")
    ] = None,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.evaluation.open_models import open_float
    from quantlens.studies.compare import compare as measure

    sets = _common.pairs(ood, "--ood") or None
    settings: dict[str, Any] = {"scores": _common.names(scores) or None, "resamples": resamples, "seed": seed}
    if weights is not None and reference is None:
        raise QuantlensError("--weights: name the float model that they are of (--reference NAME)")
    if reference is not None:
        settings["reference"] = loaded = open_float(reference, weights)
        a, b = (loaded if side == reference else side for side in (a, b))
    settings |= {name: value for name, value in (("id", id), ("ood", sets)) if value is not None}
    with _common.stages(quiet) as step:
        found = measure(a, b, progress=step, **settings)
    _common.show(_tables(found), found.to_dict(), json, "the comparison")


def _tables(comparison: Any) -> Iterator[Any]:
    """A table for every group of cells, and what must be said of them."""
    from quantlens.evaluation.differences import LEVEL, SIGNIFICANT, UNCORRECTED

    yield f"A: {comparison.a}\nB: {comparison.b}"
    for group in comparison.groups:
        seeds = f", {len(group.seeds)} seeds" if len(group.seeds) > 1 else ""
        images = "" if group.n_id is None else f", {group.n_id} ID images"
        title = f"{', '.join(group.title.values())}{seeds}{images}"
        numbers = ["A", "B", "B − A", f"{LEVEL:.0%} interval", "p", "p (Holm)"][: 3 if group.without_interval else 6]
        heads = ["metric", *numbers, *([] if group.without_interval else [""])]
        rows = [_row(one)[: len(heads)] for one in group.metrics]
        yield _common.table(heads, rows, right=numbers, whole=heads[1:], title=title)
        if group.without_interval:
            yield group.without_interval
    if any(not group.without_interval for group in comparison.groups):
        yield (
            f"{comparison.resamples} resamples of the images (and seeds), seed {comparison.seed}. {SIGNIFICANT}: "
            f"p < 0.05 after Holm's correction for all metrics; {UNCORRECTED}: its interval leaves 0 out, but p is "
            "not below 0.05 after the correction. ↑, ↓: whether higher or lower is better."
        )
    yield from (f"note: {note}" for note in comparison.notes)
    if comparison.unpaired:
        yield f"not paired: {', '.join(comparison.unpaired)}"


def _row(one: Any) -> list[str]:
    from quantlens.evaluation.result import title_of
    from quantlens.metrics import metric_of

    text = metric_of(one.path).text
    interval = f"{text(one.low, '+')} to {text(one.high, '+')}"
    p = ["–" if v is None else f"{v:.4f}" for v in (one.p, one.p_holm)]
    return [title_of(one.path), text(one.a), text(one.b), text(one.difference, "+"), interval, *p, one.verdict or ""]
