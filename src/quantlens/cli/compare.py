"""`quantlens compare`: what changed between two models, methods or studies, and whether that is significant."""

from collections.abc import Iterator
from pathlib import Path
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

The operating point: with a confidence cut and OOD thresholds that are set on FP32 (or on A) to what --coverage or
--accuracy and --keep-id promise, the share of images answered and right, false alarms and misses; then the images whose
answer flips, and what each class lost.

[bold]Examples[/bold]

    quantlens compare results:method=repq-vit,bits=W4A4 results:method=minmax,bits=W4A4

    quantlens compare results:bits=FP32 results:method=repq-vit --flips flips.csv

    quantlens compare before after --scores all --json changes.json

    quantlens compare one.npz other.npz --accuracy 0.9

    quantlens compare digits-vit digits-w8a8.onnx --id embedded:digits-test \
      --ood letters=embedded:letters
"""

MOST_FLIPS, MOST_CLASSES = 200, 10
"""Images that flip and classes that are printed for each pair and group; --json and --flips have all."""


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
    coverage: Annotated[
        float | None, typer.Option(help="Share of the ID images that the confidence cut answers (default: 0.9).")
    ] = None,
    accuracy: Annotated[
        float | None, typer.Option(help="Instead: share right among the images that it answers.")
    ] = None,
    keep_id: Annotated[float, typer.Option("--keep-id", help="Share of ID images that OOD thresholds keep.")] = 0.95,
    flips: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Write the images whose answer flips, all of them.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resampling.")] = 0,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the comparison as JSON; - is stdout.")
    ] = None,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.evaluation.open_models import open_float
    from quantlens.files import write_whole
    from quantlens.studies.compare import compare as measure

    sets = _common.pairs(ood, "--ood") or None
    settings: dict[str, Any] = {"scores": _common.names(scores) or None, "resamples": resamples, "seed": seed}
    settings |= {"coverage": coverage, "accuracy": accuracy, "keep": keep_id}
    if weights is not None and reference is None:
        raise QuantlensError("--weights: name the float model that they are of (--reference NAME)")
    if reference is not None:
        settings["reference"] = loaded = open_float(reference, weights)
        a, b = (loaded if side == reference else side for side in (a, b))
    settings |= {name: value for name, value in (("id", id), ("ood", sets)) if value is not None}
    with _common.stages(quiet) as step:
        found = measure(a, b, progress=step, **settings)
    if flips is not None:
        write_whole(flips, found.flips_csv(), what="the flips")
    _common.show(_tables(found), found.to_dict(), json, "the comparison")
    if flips is not None and json != "-":
        print(f"written: {flips}")


def _tables(comparison: Any) -> Iterator[Any]:
    """A table for every group of cells, and what must be said of them."""
    from quantlens.evaluation.differences import SIGNIFICANT, UNCORRECTED

    yield f"A: {comparison.a}\nB: {comparison.b}"
    for group in comparison.groups:
        seeds = f", {len(group.seeds)} seeds" if len(group.seeds) > 1 else ""
        images = "" if group.n_id is None else f", {group.n_id} ID images"
        title = f"{', '.join(group.title.values())}{seeds}{images}"
        yield _differences(group.metrics, title, not group.without_interval)
        if group.without_interval:
            yield group.without_interval
        yield from _operating(comparison, group)
    if any(not group.without_interval for group in comparison.groups):
        yield (
            f"{comparison.resamples} resamples of the images (and seeds), seed {comparison.seed}. {SIGNIFICANT}: "
            f"p < 0.05 after Holm's correction for all metrics; {UNCORRECTED}: its interval leaves 0 out, but p is "
            "not below 0.05 after the correction. ↑, ↓: whether higher or lower is better."
        )
    yield from (f"note: {note}" for note in comparison.notes)
    if comparison.unpaired:
        yield f"not paired: {', '.join(comparison.unpaired)}"


def _differences(metrics: Any, title: str, intervals: bool) -> Any:
    from quantlens.evaluation.differences import LEVEL

    numbers = ["A", "B", "B − A", f"{LEVEL:.0%} interval", "p", "p (Holm)"][: 6 if intervals else 3]
    heads = ["metric", *numbers, *([""] if intervals else [])]
    rows = [_row(one)[: len(heads)] for one in metrics]
    return _common.table(heads, rows, right=numbers, whole=heads[1:], title=title)


def _operating(comparison: Any, group: Any) -> Iterator[Any]:
    """The operating point, the flips and the classes of a group."""
    if group.operating:
        yield f"operating point: {comparison.promise}"
    for how, words in (("same", f"thresholds of {group.set_on} on both"), ("again", "thresholds set again on each")):
        metrics = [one for one in group.operating if one.path.split(".")[1] == how]
        if metrics:
            yield _differences(metrics, words, True)
    for seeds, sides in zip(group.seeds, group.thresholds, strict=False):
        values = (f"{name} {_number(a)} (A), {_number(sides['b'][name])} (B)" for name, a in sides["a"].items())
        yield f"thresholds{f', seeds {seeds[0]} and {seeds[1]}' if len(group.seeds) > 1 else ''}: {'; '.join(values)}"
    for flips in group.flips:
        yield from _flips(flips, len(group.flips) > 1)
    if group.classes:
        changed = [one for one in group.classes if one.difference][:MOST_CLASSES]
        left = sum(one.difference != 0 for one in group.classes) - len(changed)
        heads = ["class", "images", "A", "B", "B − A", "95 % interval", ""]
        title = f"top-1 % by class, the largest loss first; {len(group.classes) - len(changed) - left} without a change"
        if changed:
            yield _common.table(heads, map(_class, changed), right=heads[1:6], whole=heads[1:], title=title)
        if left > 0:
            yield f"{left} further classes changed: --json FILE has all"


def _number(threshold: float | None) -> str:
    return "none keeps the promise" if threshold is None else f"{threshold:.6g}"


def _flips(flips: Any, several: bool) -> Iterator[Any]:
    counts = flips.counts
    seeds = f", seeds {flips.seeds[0]} and {flips.seeds[1]}" if several else ""
    yield (
        f"answers that flip, of {counts['n']} images{seeds}: {counts['right_to_wrong']} right → wrong, "
        f"{counts['wrong_to_right']} wrong → right, {counts['wrong_to_wrong']} wrong → other wrong"
    )
    heads = ["image", "", "true class", "A (confidence %)", "B (confidence %)", "true class, points"]
    if flips.images:
        rows = (_flip(one) for one in flips.images[:MOST_FLIPS])
        yield _common.table(heads, rows, right=heads[5:])
    if (left := len(flips.images) - MOST_FLIPS) > 0:
        yield f"{left} further images: --flips FILE.csv or --json FILE has all"


def _flip(one: Any) -> list[str]:
    def answer(number: int, name: str | None) -> str:
        return str(number) if name is None else name.partition(",")[0]  # ImageNet's have many names

    return [
        f"{one.index}" if one.image is None else one.image,
        one.kind.replace("_to_", " → ").replace("wrong → wrong", "wrong → other"),
        answer(one.label, one.label_name),
        f"{answer(one.a, one.a_name)} ({one.a_confidence:.0%})".replace("%", ""),
        f"{answer(one.b, one.b_name)} ({one.b_confidence:.0%})".replace("%", ""),
        f"{100 * one.change:+.1f}",
    ]


def _class(one: Any) -> list[str]:
    from quantlens.metrics import METRICS

    text = METRICS["top1"].text
    interval = f"{text(one.low, '+')} to {text(one.high, '+')}"
    name = str(one.number) if one.name is None else one.name
    few = "few images" if one.few else ""
    return [name, str(one.n), text(one.a), text(one.b), text(one.difference, "+"), interval, few]


def _row(one: Any) -> list[str]:
    from quantlens.evaluation.result import title_of
    from quantlens.metrics import metric_of

    text = metric_of(one.path).text
    interval = f"{text(one.low, '+')} to {text(one.high, '+')}"
    p = ["–" if v is None else f"{v:.4f}" for v in (one.p, one.p_holm)]
    return [title_of(one.path), text(one.a), text(one.b), text(one.difference, "+"), interval, *p, one.verdict or ""]
