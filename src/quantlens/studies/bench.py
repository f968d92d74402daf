"""A race of exported files, in one call: latency, and on images also quality, of the files of one model against each
other, the float model, and what the runtimes' own tools make of it."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlens.arguments import checked
from quantlens.errors import QuantlensError
from quantlens.evaluation.environment import environment
from quantlens.export.bench import Contender, bench as time_them, line_up
from quantlens.files import check_writable

ImageProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Timings:
    """What :func:`bench` measured. timings: of every contender at every batch size and thread count, as
    :func:`quantlens.export.bench.bench` gives them, with what `studies.quality` adds where images were given;
    contenders: what each is (`Artefact.facts`), the baseline of the ratios first; machine: processor and versions.
    results: the evaluation (`Result`) of each, by fingerprint. front_by: the metric that the front weighs."""

    timings: list[dict[str, Any]]
    contenders: list[dict[str, Any]]
    machine: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    front_by: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """{"timings": [{"label", "batch", "threads", "median_ms", "p10_ms", "p90_ms", "images_per_second", "size_mb",
        "memory_mb", "speedup", …}], "contenders", "machine"}."""
        return {"timings": self.timings, "contenders": self.contenders, "machine": self.machine}

    def to_pandas(self) -> Any:
        """A pandas DataFrame, a row per timing, with model, method and bits of what was timed. Raises UnsupportedError
        where pandas is not installed."""
        from quantlens.evaluation.result import frame

        known = {one["fingerprint"]: {key: one[key] for key in ("model", "method", "bits")} for one in self.contenders}
        rows = [{**timing, **known[timing["fingerprint"]]} for timing in self.timings]
        return frame(rows, list(rows[0]))


@checked
def bench(
    files: str | Path | Sequence[str | Path],
    *,
    batch: int | Sequence[int] = 1,
    threads: int | Sequence[int] = 1,
    rounds: int = 30,
    fp32: Any = None,
    weights: str | None = None,
    peers: bool = False,
    calibration: Any = None,
    id: Any = None,
    ood: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    store: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    evaluating: ImageProgress | None = None,
) -> Timings:
    """Time exported files (.onnx, .xml, .pt2) of one model, in one process with interleaved runs.

    batch, threads: sizes of batches, numbers of CPU threads. rounds: counted runs of each. fp32: the float model (its
    name, with ``weights`` as for `load_model`; what that gives; an nn.Module), which becomes the baseline of the
    ratios, followed by its files in the runtimes that are installed. peers: also the runtimes' own int8, quantized
    with ``calibration`` (as for `quantize`; None: noise). id, ood: images as for `evaluate`, on which all contenders
    are evaluated before they are timed. folder: where the float and the peers' files are kept. store: a study's folder,
    in which timings and evaluations are kept. progress: called with (rounds done, in all), evaluating with (what,
    images done, in all).

    Raises QuantlensError for no files, files that cannot be run, and files of different sizes of image.
    """
    counts = _counts(batch=batch, threads=threads, rounds=rounds)
    _check_images(peers, calibration, id, ood)
    if weights is not None and not isinstance(fp32, str):
        raise QuantlensError("weights are those of a float model's name: give it as fp32 (--fp32 MODEL), too")
    check_writable(None if store is None else Path(store) / "store.sqlite")
    fp32 = None if fp32 is None else _float(fp32, weights)
    paths = [files] if isinstance(files, str | Path) else list(files)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch if folder is None else folder)
        contenders = line_up(paths, place, fp32=fp32, with_peers=peers, peer_images=calibration)
        results = {}
        if id is not None:
            from quantlens.studies.quality import evaluated

            results = evaluated(contenders, id, ood, threads=max(counts["threads"]), progress=evaluating)
        settings: dict[str, Any] = {
            "batches": counts["batch"],
            "threads": counts["threads"],
            "rounds": rounds,
            "progress": progress,
        }
        timings = time_them(contenders, input_size=_size(contenders), **settings)
    found = Timings(timings, [c.facts for c in contenders], environment(), results)
    if store is not None:
        _keep(Path(store), found)
    if not results:
        return found
    from quantlens.studies.quality import add_quality

    return replace(found, front_by=add_quality(found.timings, found.contenders, results))


def _check_images(peers: bool, calibration: Any, id: Any, ood: Any) -> None:
    if ood and id is None:
        raise QuantlensError("OOD sets are measured against ID images: give these, too (--id)")
    if peers and id is not None and calibration is None:
        raise QuantlensError(
            "the peers are evaluated, too: give the images that they quantize with (--calibration), as with noise they "
            "would be worse than they are"
        )


def _size(contenders: Sequence[Contender]) -> Any:
    """The size of images, which the last one, a file, says."""
    model = contenders[-1].model
    assert model is not None
    return model(1).preprocess.input_size


def _keep(directory: Path, found: Timings) -> None:
    """Record timings, and evaluations, in a study's store."""
    from quantlens.studies.benchmarks import put_artefact, put_timings
    from quantlens.studies.store import Store

    with Store(directory) as store:
        for facts in found.contenders:
            if facts["fingerprint"] in found.results:
                put_artefact(store, facts, found.results[facts["fingerprint"]].to_dict())
        put_timings(store, found.timings, found.contenders, found.machine)


def _float(model: Any, weights: str | None) -> Any:
    from quantlens.evaluation.open_models import open_float
    from quantlens.models import Model, load_model

    if isinstance(model, str):
        return open_float(model, weights)
    return model if isinstance(model, Model) else load_model(model)


def _counts(**given: int | Sequence[int]) -> dict[str, list[int]]:
    """Each as a list. Raises QuantlensError for none, and for one below 1."""
    counts = {name: [value] if isinstance(value, int) else list(value) for name, value in given.items()}
    for name, values in counts.items():
        if not values or min(values) < 1:
            raise QuantlensError(f"{name} is {values}; give whole numbers from 1 on")
    return counts
