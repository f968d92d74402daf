"""`quantlens bench`: latency of exported models, interleaved, against what they replace."""

from __future__ import annotations

import json as standard
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlens.cli import _options
from quantlens.cli._common import command

if TYPE_CHECKING:
    from quantlens.export.bench import Race, Timing

HELP = """Time exported models against each other, in one process with interleaved runs.

The first contender is the baseline of the ratios: with --fp32 that is the float model in PyTorch, followed by the float
model in the runtimes that are installed; with --peers also what the runtimes' own tools make of it at 8 bits.

With --store the timings are kept in the store of a study, beside the evaluations that `quantlens evaluate FILE --store`
keeps there, and `quantlens report` shows accuracy, OOD detection, latency and size in one table with its Pareto front.

[bold]Examples[/bold]

    quantlens bench digits.onnx digits.xml --batch 1,8 --threads 1,2

    quantlens bench deit.xml --fp32 deit_tiny_patch16_224 \\
      --weights deit_tiny.safetensors --json bench.json

    quantlens evaluate deit.xml --id imagenet:val --store results

    quantlens bench deit.xml --store results

    quantlens report results
"""

Batch = Annotated[list[str] | None, typer.Option(metavar="N,N", help="Batch sizes.")]
Threads = Annotated[list[str] | None, typer.Option(metavar="N,N", help="CPU threads (default: 1).")]
Rounds = Annotated[int, typer.Option(min=3, help="Counted runs of each.")]
FloatModel = Annotated[str | None, typer.Option(metavar="MODEL", help="Name of the float model to compare with.")]
Weights = Annotated[str | None, typer.Option(metavar="W", help="Its weights: a file, pretrained or random.")]
Peers = Annotated[bool, typer.Option("--peers", help="Also ONNX Runtime's and NNCF's own int8 (needs --fp32).")]
PeerImages = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="Images that the peers quantize with (default: noise).")
]
Files = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Keep the float and the peers' files here, to evaluate them too.")
]
InStore = Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the timings in the store of a study.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the timings as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "bench", HELP, bench)


def bench(
    artefacts: _options.ExportedFiles,
    batch: Batch = None,
    threads: Threads = None,
    rounds: Rounds = 30,
    fp32: FloatModel = None,
    weights: Weights = None,
    peers: Peers = False,
    calibration: PeerImages = None,
    files: Files = None,
    store: InStore = None,
    json: Json = None,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.cli import _common
    from quantlens.errors import QuantlensError
    from quantlens.evaluation.open_models import weights_named
    from quantlens.export.bench import check_files, race
    from quantlens.files import check_writable, write_whole

    check_writable(json)
    check_writable(store and store / "store.sqlite")
    check_files(artefacts)
    settings: dict[str, Any] = {"batches": _common.whole_numbers(batch, "--batch") or [1], "rounds": rounds}
    settings["threads"] = _common.whole_numbers(threads, "--threads") or [1]
    if peers and fp32 is None:
        raise QuantlensError("--peers needs --fp32 MODEL: the float model that the other tools quantize")
    if fp32 is not None:
        from quantlens.models import load_model

        settings["fp32"] = load_model(fp32, weights_named(weights))
    settings |= {"with_peers": peers, "peer_images": calibration, "folder": files}
    with _common.stages(quiet) as step:
        found = race(artefacts, progress=partial(step, "timing"), **settings)
    _common.stdout().print(_table(found.timings))
    if store is not None:
        _keep(found, store)
        _common.say(f"kept in {store}; `quantlens report {store}` shows them")
    if json is not None:
        write_whole(json, standard.dumps(found.to_list(), indent=1), what="the timings")
        _common.say(f"written: {json}")


def _keep(found: Race, directory: Path) -> None:
    """Record the run in a study's store."""
    from quantlens.evaluation.environment import environment
    from quantlens.studies.benchmarks import put_timings
    from quantlens.studies.store import Store

    with Store(directory) as store:
        put_timings(store, found.to_list(), found.facts, environment())


def _table(found: list[Timing]) -> Any:
    from rich.table import Table

    table = Table(caption=f"ratios to {found[0].label}; runs interleaved", caption_justify="left")
    for column in ("model", "batch", "threads", "median ms", "p10 to p90", "images/s", "ratio", "MB", "memory MB"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for t in found:
        table.add_row(
            t.label,
            str(t.batch),
            str(t.threads),
            f"{t.median_ms:.2f}",
            f"{t.p10_ms:.2f} to {t.p90_ms:.2f}",
            f"{t.images_per_second:.1f}",
            f"{t.speedup:.2f}×",
            "–" if t.size_mb is None else f"{t.size_mb:.2f}",
            "–" if t.memory_mb is None else f"{t.memory_mb:.0f}",
        )
    return table
