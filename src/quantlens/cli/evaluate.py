"""`quantlens evaluate`: the metrics of one model, FP32 or quantized."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _common, _options
from quantlens.errors import QuantlensError
from quantlens.files import check_writable, write_whole

CHANGE = "quantized − FP32"
SHOWN_CORRUPTIONS = 8
"""With more corrupted sets than this, their means alone are printed."""


HELP = """Measure a model on labelled in-distribution images and on out-of-distribution sets.

MODEL is a name as for `quantize`, a quantized checkpoint (.safetensors) that `quantize` wrote, or an exported file
(.onnx, .xml), which is measured in its runtime. With the latter two, --weights names the FP32 checkpoint it was made
from, which is then measured on the same images, and what quantization changed is shown. It may also be another tool's
.onnx or .xml file, with --reference (and --weights) the float model it came from, or a file of logits (.npz, .csv),
which needs no --id (docs/foreign.md).

Scores that need statistics (KNN, ViM, Mahalanobis, ReAct …) are fitted on the images of --fit, which must not be among
those evaluated.

--shift and --corrupt measure a classifier under shift: on other images of the same classes, and on corruptions of the
ID images (those of ImageNet-C), with OOD detection that counts all of them as in-distribution.

What is measured depends on what the model is for (--task): accuracy and calibration of a classifier, AUROC and average
precision of a binary or multi-label one, k-NN and linear-probe accuracy of features (both fitted on --fit), mAP,
calibration and drift of boxes of a detector (on images with boxes, such as coco:DIR).

[bold]Examples[/bold]

    quantlens evaluate digits-vit --id embedded:digits-test \\
      --ood letters=embedded:letters

    quantlens evaluate digits-vit-w4a4.safetensors --weights pretrained \\
      --id embedded:digits-test --fit embedded:digits-fit \\
      --ood letters=embedded:letters --json result.json

    quantlens evaluate deit_tiny_patch16_224 --weights deit_tiny.safetensors \\
      --id imagenet:val --ood dtd=images:dtd/images \\
      --ood ninco=images:ninco --near ninco

    quantlens evaluate deit_tiny_patch16_224 --id imagenet:val?n=1000 \
      --shift v2=imagenet:imagenetv2 --corrupt fog:3 --corrupt jpeg_compression

    quantlens evaluate nncf.xml --reference deit_tiny_patch16_224 \
      --weights deit_tiny.safetensors --id imagenet:val
"""


def evaluate(
    model: _options.ModelOrCheckpoint,
    id: Annotated[
        str | None, typer.Option("--id", metavar="SOURCE", help="Labelled images (`quantlens sources`).")
    ] = None,
    weights: _options.Weights = None,
    reference: _options.Reference = None,
    input_size: _options.InputSize = None,
    letterbox: _options.Letterbox = False,
    ood: _options.OodSets = None,
    near: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Which of these sets are near; may be repeated.")
    ] = None,
    fit: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="ID images, not evaluated, that scores are fitted on.")
    ] = None,
    shift: _options.ShiftedSets = None,
    corrupt: _options.Corruptions = None,
    scores: _options.Scores = None,
    task: _options.Task = None,
    text_embeddings: _options.TextEmbeddings = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is stdout.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Keep per-image outputs, for `quantlens compare`.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the result of an exported file in the store of a study.")
    ] = None,
    card: _options.Card = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images per forward pass, at most: a CPU takes as many as its cache likes.")
    ] = 64,
    bins: Annotated[int, typer.Option(min=1, help="Bins of the calibration error.")] = 15,
    device: _options.Device = "auto",
    skip_bad: _options.SkipBad = False,
    no_cache: _options.NoCache = False,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.evaluation.open_models import open_models
    from quantlens.evaluation.run import evaluate as measure

    _check(model, id, (None if json == "-" else json, keep, store and store / "store.sqlite"))
    checkpoint = _check_card(model) if card else None
    sets, groups = _common.pairs(ood, "--ood"), dict.fromkeys(_common.names(near), "near")
    measured, float_model = open_models(model, weights, device, input_size, reference=reference, letterbox=letterbox)
    _check_store(store, measured)
    settings = {"fit": fit, "reference": float_model, "scores": _common.names(scores) or None, "groups": groups}
    settings |= {"task": task, "text_embeddings": text_embeddings, "shift": _shift_of(shift, corrupt)}
    settings |= {"batch_size": batch_size, "device": device, "n_bins": bins}
    settings["keep"] = keep is not None or (card and "scores")
    with _common.stages(quiet) as step:
        result = measure(measured, id, sets or None, progress=step, **settings, **_common.reading(skip_bad, no_cache))
    written = list(_write(result, keep, checkpoint))
    _keep(store, measured, result)
    _common.show(tables(result), result.to_dict(), json, "the result")
    if json != "-":
        print("".join(f"written: {file}\n" for file in written), end="")


def _shift_of(shift: list[str] | None, corrupt: list[str] | None) -> dict[str, Any]:
    return _common.pairs(shift, "--shift") | ({"corrupt": corrupt} if corrupt else {})


def _check_store(store: Path | None, measured: Any) -> None:
    if store is not None and not hasattr(measured, "facts"):
        raise QuantlensError("--store keeps results of exported files (.onnx, .xml); a study measures models into it")


def _check(model: str, id: str | None, files: Iterable[str | Path | None]) -> None:
    """Raises QuantlensError where there are no images to measure on, or a file cannot be written."""
    if id is None and Path(model).suffix not in (".npz", ".csv"):
        raise QuantlensError("Missing option '--id': give labelled images, a SOURCE (`quantlens sources`)")
    for file in files:
        check_writable(file)


def _check_card(model: str) -> Path:
    """The checkpoint that a card is written beside. Raises QuantlensError where none can be."""
    from quantlens.evaluation.open_models import checkpoint_of
    from quantlens.report.card import check_place

    here = not model.startswith("hf:") or Path(model.removeprefix("hf:")).exists()
    checkpoint = checkpoint_of(model) if here else None
    if checkpoint is None:
        raise QuantlensError("--card is written beside a quantized checkpoint that lies here; name its file or folder")
    check_place(checkpoint.parent, checkpoint.name)
    return checkpoint


def _write(result: Any, keep: Path | None, checkpoint: Path | None) -> Iterator[Path]:
    """Write the per-image outputs, and the card beside a checkpoint, where they are wanted; the files written."""
    from quantlens.evaluation import outputs
    from quantlens.report.card import README, card

    if keep is not None and result.outputs is not None:
        yield write_whole(keep, outputs.pack(result.outputs), what="the per-image outputs")
    if checkpoint is not None:
        card(checkpoint, result)
        yield checkpoint.with_name(README)


def _keep(directory: Path | None, measured: Any, result: Any) -> None:
    """Record the result of an exported file in a study's store, where one is named."""
    from quantlens.studies.benchmarks import put_artefact
    from quantlens.studies.store import Store

    if directory is not None:
        with Store(directory) as store:
            put_artefact(store, measured.facts(), result.to_dict())


def tables(result: Any) -> Iterator[Any]:
    """What is printed of a result: percent, with the FP32 metric and the change where they are known."""
    from quantlens.evaluation.result import summary
    from quantlens.metrics import METRICS, metrics_of

    yield from summary(result)
    heads = ["metric", "value", *(["FP32", CHANGE] if result.fp32 else [])]
    fp32, change = ((part or {}).get("id", {}) for part in (result.fp32, result.change))
    shown = [(METRICS[name], name) for name in metrics_of(result.task, fitted=True) if name in result.id]
    rows = [
        (m.heading, m.text(result.id[name]), m.text(fp32.get(name)), m.text(change.get(name), "+"))[: len(heads)]
        for m, name in shown
    ]
    if rows:
        yield _common.table(heads, rows, right=heads[1:], title="In distribution")
    if result.shift:
        yield from _shift_tables(result)
    if result.ood:
        yield from _ood_tables(result, METRICS["aupr_out"])
    if result.guard is not None:
        yield _guard_table(result.guard, [METRICS[name] for name in ("kept", "flagged", "balanced_accuracy")])
    lacking = {**result.metrics_unavailable, **(result.scores_unavailable if result.ood else {})}
    for reason in dict.fromkeys(lacking.values()):
        names = [METRICS[name].title if name in METRICS else name for name, why in lacking.items() if why == reason]
        yield f"left out: {'; '.join(names)} ({'each ' if len(names) > 1 else ''}{reason})"


def _ood_tables(result: Any, aupr: Any) -> Iterator[Any]:
    from quantlens.metrics import first_score, score_label

    means = {f"mean {group}": result.ood_mean[group] for group in ("far", "near") if group in result.ood_mean}
    columns = {**result.ood, **means}
    rows = [
        [score, *(aupr.text(entry.get(score, {}).get("aupr_out")) for entry in columns.values())]
        for score in result.histograms
    ]
    for score in list(result.histograms)[:1]:
        rows.append(["chance", *(aupr.text(entry.get(score, {}).get("chance_aupr_out")) for entry in columns.values())])
    title = f"Out of distribution, {aupr.heading} by score"
    yield _common.table(["score", *columns], rows, right=columns, title=title)
    score = first_score(result.histograms)
    if result.change is not None and result.histograms:
        changes = result.change["ood"]
        row = [aupr.text(entry.get(score, {}).get("aupr_out"), "+") for entry in changes.values()]
        title = f"Change of {aupr.title} by {score_label(score)}, {aupr.change_unit} ({CHANGE}) {aupr.arrow}"
        yield _common.table(list(changes), [row], right=changes, title=title)


def _shift_tables(result: Any) -> Iterator[Any]:
    """The metrics of the shifted sets (of corruptions the means, where they are many), and full-spectrum detection."""
    from quantlens.evaluation.shift import corruption_of
    from quantlens.metrics import METRICS

    many = sum(corruption_of(name) is not None for name in result.shift) > SHOWN_CORRUPTIONS
    chosen = {name: ("shift", name) for name in result.shift if not many or corruption_of(name) is None}
    chosen |= {f"mean, {name.replace('_', ' ')}": ("shift_mean", name) for name in result.shift_mean}

    def entries(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [found["id"], *(found[part][name] for part, name in chosen.values())]

    metrics = [METRICS[name] for name in ("top1", "nll", "ece")]
    heads, rows = [metric.heading for metric in metrics], [["ID images"], *([name] for name in chosen)]
    for found, sign in ((vars(result), ""), (result.change, "+")):
        for row, entry in zip(rows, entries(found) if found else (), strict=bool(found)):
            row += [metric.text(entry.get(metric.name), sign) for metric in metrics]
    if result.change:
        heads += [f"Δ {metric.title}" for metric in metrics]
    title = "Under shift" + (f" (Δ: {CHANGE})" if result.change else "")
    yield _common.table(["images", *heads], rows, right=heads, title=title)
    means = result.shift_mean.get("corruptions", {})
    known = [(METRICS[name], means[name]) for name in ("mce", "relative_mce") if name in means]
    if known:
        yield "mean corruption error: " + ", ".join(f"{metric.label} {metric.text(value)}" for metric, value in known)
    if result.full_spectrum_mean:
        yield _spectrum_table(result, METRICS["aupr_out"], METRICS["auroc"])


def _spectrum_table(result: Any, *metrics: Any) -> Any:
    groups = {group: means for group, means in result.full_spectrum_mean.items() if group != "all"}
    heads = [f"mean {group} {metric.label}" for group in groups for metric in metrics]
    rows = [
        [score, *(m.text(means.get(score, {}).get(m.name)) for means in groups.values() for m in metrics)]
        for score in result.histograms
    ]
    title = "Full-spectrum OOD detection (shifted images are in-distribution) ↑"
    return _common.table(["score", *heads], rows, right=heads, title=title)


def _guard_table(guard: Mapping[str, Any], metrics: list[Any]) -> Any:
    """What the OOD threshold of a file keeps and flags, and how often it is right."""
    kept = guard["id"]["kept"]
    shares: dict[str, tuple[Any, ...]] = {"ID": (kept, 1 - kept, None)}
    for name, entry in guard["ood"].items():
        shares[name] = (1 - entry["flagged"], entry["flagged"], entry["balanced_accuracy"])
    rows = [[name, *(m.text(v) for m, v in zip(metrics, row, strict=True))] for name, row in shares.items()]
    heads = [metric.label for metric in metrics]
    title = f"OOD threshold: {guard['score']} below {guard['threshold']['value']:.3f} looks unknown"
    return _common.table(["images", *heads], rows, right=heads, title=title)
