"""`quantlens evaluate`: the metrics of one model, FP32 or quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _options
from quantlens.cli._common import command

HELP = """Measure a model on labelled in-distribution images and on out-of-distribution sets.

MODEL is a name as for `quantize`, a quantized checkpoint (.safetensors) that `quantize` wrote, or an exported file
(.onnx, .xml), which is measured in its runtime. With the latter two, --weights names the FP32 checkpoint it was made
from, which is then measured on the same images, and what quantization changed is shown.

Scores that need statistics (KNN, ViM, Mahalanobis, ReAct …) are fitted on the images of --fit, which must not be among
those evaluated.

[bold]Examples[/bold]

    quantlens evaluate digits-vit --id embedded:digits-test \\
      --ood letters=embedded:letters

    quantlens evaluate digits-vit-w4a4.safetensors --weights pretrained \\
      --id embedded:digits-test --fit embedded:digits-fit \\
      --ood letters=embedded:letters --json result.json

    quantlens evaluate deit_tiny_patch16_224 --weights deit_tiny.safetensors \\
      --id imagenet:val --ood dtd=images:dtd/images \\
      --ood ninco=images:ninco --near ninco
"""


Id = Annotated[str, typer.Option("--id", metavar="SOURCE", help="Labelled images (`quantlens sources`).")]
Near = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Which of these sets are near; may be repeated.")]
Fit = Annotated[str | None, typer.Option(metavar="SOURCE", help="ID images, not evaluated, that scores are fitted on.")]
Scores = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAMES",
        help="OOD scores (default: all): msp, maxlogit, energy, entropy, gen, knn, vim, mahalanobis, rmahalanobis "
        "(relative), mahalanobis_l2, rmahalanobis_l2, react.",
    ),
]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is stdout.")]
Keep = Annotated[Path | None, typer.Option(metavar="FILE.npz", help="Keep per-image outputs, for `quantlens compare`.")]
InStore = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Keep the result of an exported file in the store of a study.")
]
Bins = Annotated[int, typer.Option(min=1, help="Bins of the calibration error.")]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Images per forward pass, at most: a CPU takes as many as its cache likes.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "evaluate", HELP, evaluate)


def evaluate(
    model: _options.ModelOrCheckpoint,
    id: Id,
    weights: _options.Weights = None,
    ood: _options.OodSets = None,
    near: Near = None,
    fit: Fit = None,
    scores: Scores = None,
    json: Json = None,
    keep: Keep = None,
    store: InStore = None,
    batch_size: BatchSize = 64,
    bins: Bins = 15,
    device: _options.Device = "auto",
    skip_bad: _options.SkipBad = False,
    no_cache: _options.NoCache = False,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.cli import _common
    from quantlens.errors import QuantlensError
    from quantlens.evaluation import evaluate as measure
    from quantlens.evaluation.environment import choose_device
    from quantlens.evaluation.images import groups_of
    from quantlens.evaluation.open_models import open_models
    from quantlens.evaluation.scoring import choose_scores
    from quantlens.files import check_writable

    for path in (None if json == "-" else json, keep, store and store / "store.sqlite"):
        check_writable(path)
    sets = _common.pairs(ood, "--ood", "NAME=SOURCE")
    groups = dict.fromkeys(_common.names(near) or (), "near")
    wanted = _common.names(scores)
    choose_scores(wanted)
    groups_of(sets, groups)
    chosen = choose_device(device)
    measured, reference = open_models(model, weights, chosen)
    if store is not None and not hasattr(measured, "facts"):
        raise QuantlensError("--store keeps results of exported files (.onnx, .xml); a study measures models into it")
    settings: dict[str, Any] = {"fit": fit, "reference": reference, "scores": wanted, "groups": groups}
    settings |= {"batch_size": batch_size, "device": chosen, "n_bins": bins, "skip_bad": skip_bad}
    settings |= {"cache_dir": _common.cache_argument(no_cache), "keep": keep is not None}
    with _common.stages(quiet) as step:
        result = measure(measured, id, sets, progress=step, **settings)
    if keep is not None:
        from quantlens.evaluation import outputs

        assert result.outputs is not None
        outputs.write(keep, result.outputs)
    if store is not None:
        from quantlens.studies.benchmarks import put_artefact
        from quantlens.studies.store import Store

        with Store(store) as kept:
            put_artefact(kept, measured.facts(), result.to_dict())
    _show(result, json, keep)


def _show(result: Any, json: str | None, keep: Path | None) -> None:
    """Print the result as tables and write it as JSON where that is asked for; `-`: print JSON alone."""
    from quantlens.cli import _common
    from quantlens.cli._tables import result_tables

    if json == "-":
        import json as standard

        print(standard.dumps(result.to_dict(), indent=1, allow_nan=False))
        return
    console = _common.stdout()
    for part in result_tables(result):
        console.print(part)
    if json is not None:
        result.save_json(json)
        _common.say(f"written: {json}")
    if keep is not None:
        _common.say(f"written: {keep}")
