"""`quantlens bench`: latency of exported models, interleaved, against what they replace."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _common, _options
from quantlens.files import check_writable

HELP = """Time exported models against each other, in one process with interleaved runs, and evaluate them.

The first contender is the baseline of the ratios: with --fp32 that is the float model in PyTorch, followed by the float
model in the runtimes that are installed; with --peers also what the runtimes' own tools make of it at 8 bits.

With --id (and --ood) every contender is evaluated too, on the same images: accuracy, OOD detection, SQNR of the logits
and agreement of the predictions against the float model, and which integers saturate on this processor. The table then
has a row for each contender, and marks the Pareto front of SQNR against latency.

With --store timings and evaluations are kept in the store of a study, beside those that `quantlens evaluate FILE
--store` keeps there, and `quantlens report` shows accuracy, OOD detection, latency and size in one table with its
Pareto front.

[bold]Examples[/bold]

    quantlens bench digits.onnx digits.xml --batch 1,8 --threads 1,2

    quantlens bench deit.xml --fp32 deit_tiny_patch16_224 \\
      --weights deit_tiny.safetensors --json bench.json

    quantlens bench deit.onnx deit.xml --fp32 deit_tiny_patch16_224 \\
      --weights deit_tiny.safetensors --peers \\
      --calibration "imagenet:train?n=32" --id imagenet:val \\
      --ood textures=images:textures --batch 1,8 --threads 1,2

    quantlens evaluate deit.xml --id imagenet:val --store results

    quantlens bench deit.xml --store results

    quantlens report results
"""


def bench(
    artefacts: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Exported models: .onnx or .xml.")],
    batch: Annotated[list[str] | None, typer.Option(metavar="N,N", help="Batch sizes.")] = None,
    threads: Annotated[list[str] | None, typer.Option(metavar="N,N", help="CPU threads (default: 1).")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Counted runs of each.")] = 30,
    fp32: Annotated[str | None, typer.Option(metavar="MODEL", help="Name of the float model to compare with.")] = None,
    weights: Annotated[str | None, typer.Option(metavar="W", help="Its weights: a file, pretrained or random.")] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also ONNX Runtime's and NNCF's own int8 (needs --fp32).")
    ] = False,
    calibration: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Images that the peers quantize with (default: noise).")
    ] = None,
    id: Annotated[
        str | None, typer.Option("--id", metavar="SOURCE", help="Evaluate all of them on these labelled images, too.")
    ] = None,
    ood: _options.OodSets = None,
    files: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the float and the peers' files here.")] = None,
    store: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep timings and evaluations in the store of a study.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the timings as JSON.")] = None,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.studies.bench import bench as time_files

    check_writable(json)
    with _common.stages(quiet) as step:
        race = time_files(
            artefacts,
            batch=_common.whole_numbers(batch, "--batch") or 1,
            threads=_common.whole_numbers(threads, "--threads") or 1,
            rounds=rounds,
            fp32=fp32,
            weights=weights,
            peers=peers,
            calibration=calibration,
            id=id,
            ood=_common.pairs(ood, "--ood") or None,
            folder=files,
            store=store,
            progress=partial(step, "timing"),
            evaluating=step,
        )
    found, by = race.timings, race.front_by
    _common.show([_table(found) if by is None else quality_table(found, by)], found, json, "the timings")
    if store is not None:
        print(f"kept in {store}; `quantlens report {store}` shows them")


def _table(found: list[dict[str, Any]]) -> Any:
    rows = [
        (
            t["label"],
            str(t["batch"]),
            str(t["threads"]),
            f"{t['median_ms']:.2f}",
            f"{t['p10_ms']:.2f} to {t['p90_ms']:.2f}",
            f"{t['images_per_second']:.1f}",
            f"{t['speedup']:.2f}×",
            "–" if t["size_mb"] is None else f"{t['size_mb']:.2f}",
            "–" if t["memory_mb"] is None else f"{t['memory_mb']:.0f}",
        )
        for t in found
    ]
    heads = ["model", "batch", "threads", "median ms", "p10 to p90", "images/s", "ratio", "MB", "memory MB"]
    return _common.table(heads, rows, right=heads[1:], caption=f"ratios to {found[0]['label']}; runs interleaved")


MARK = "●"
"""Of what is on the Pareto front."""


def quality_table(found: list[dict[str, Any]], by: str) -> Any:
    """A row for each contender: what it is worth, and its latency at every batch size and thread count, with ratio and
    mark of the front. by: the metric of the front."""
    from quantlens.metrics import METRICS

    places = list(dict.fromkeys((t["batch"], t["threads"]) for t in found))
    names = [name for name in METRICS if name in found[0] and METRICS[name].family not in ("size", "speed")]
    rows = []
    for one in (t for t in found if (t["batch"], t["threads"]) == places[0]):
        timed = [t for t in found if t["fingerprint"] == one["fingerprint"]]
        times = [f"{t['median_ms']:.1f} {t['speedup']:.2f}×{MARK if t['front'] else ' '}" for t in timed]
        said = (f"{one['label']}: integers {one['integers']}" if one["integers"] else one["label"],)
        rows.append((*said, *(METRICS[name].text(one[name]) for name in names), *times))
    heads = ["model", *(METRICS[name].heading for name in names)]
    heads += [f"ms, {batch} on {threads}" for batch, threads in places]
    front = f"{MARK} on the Pareto front of {METRICS[by].title} against latency"
    caption = f"ms of a batch on so many threads, with ratios to {found[0]['label']}; runs interleaved; {front}"
    return _common.table(heads, rows, right=heads[1:], caption=caption)
