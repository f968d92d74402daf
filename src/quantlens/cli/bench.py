"""`quantlens bench`: latency of exported models, interleaved, against what they replace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _options
from quantlens.cli._common import command

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


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "bench", HELP, bench)


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
    files: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the float and the peers' files here, to evaluate them too.")
    ] = None,
    store: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the timings in the store of a study.")] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the timings as JSON.")] = None,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    import tempfile

    from quantlens.cli import _common
    from quantlens.errors import QuantlensError
    from quantlens.export import bench as timing
    from quantlens.export.exported import Artefact

    sizes = {tuple(Artefact(path).preprocess.input_size) for path in artefacts}
    if len(sizes) > 1:
        raise QuantlensError("the files take images of different sizes; time those of one model together")
    (size,) = sizes
    if peers and fp32 is None:
        raise QuantlensError("--peers needs --fp32 MODEL: the float model that the other tools quantize")
    with tempfile.TemporaryDirectory() as scratch, _common.stages(quiet) as step:
        folder = scratch if files is None else files
        contenders = [timing.contender(path) for path in artefacts]
        if fp32 is not None:
            from quantlens.models import load_model

            model = load_model(fp32, _common.weights_argument(weights))
            floats = [timing.eager(model), *timing.float_files(model, Path(folder))]
            others = timing.peers(model, _images(calibration, model, size), Path(folder)) if peers else []
            contenders = floats + others + contenders
        found = timing.bench(
            contenders,
            input_size=size,  # type: ignore[arg-type]
            batches=_common.whole_numbers(batch, "--batch") or [1],
            threads=_common.whole_numbers(threads, "--threads") or [1],
            rounds=rounds,
            progress=lambda done, total: step("timing", done, total),
        )
    _common.stdout().print(_table(found))
    if store is not None:
        from quantlens.evaluation.environment import environment
        from quantlens.studies.benchmarks import put_timings
        from quantlens.studies.store import Store

        with Store(store) as kept:
            put_timings(kept, [t.to_dict() for t in found], [c.facts for c in contenders], environment())
        _common.say(f"kept in {store}; `quantlens report {store}` shows them")
    if json is not None:
        import json as standard

        json.write_text(standard.dumps([t.to_dict() for t in found], indent=1), encoding="utf-8")
        _common.say(f"written: {json}")


def _images(calibration: str | None, model: Any, size: tuple[int, ...]) -> Any:
    """What the peers quantize with: float32 [n, 3, H, W]; noise gives their speed, not their accuracy."""
    import numpy as np

    if calibration is None:
        return np.random.default_rng(0).standard_normal((16, *size), dtype=np.float32)
    from quantlens.data import as_image_set, open_source

    return as_image_set(open_source(calibration), model.preprocess).tensor().numpy()


def _table(found: list[Any]) -> Any:
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
