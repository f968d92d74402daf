"""Quality of the contenders of a race, beside their latency: each evaluated on the same images, near or far from the
float model, and which of them are on the Pareto front."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from quantlens.data import as_image_set
from quantlens.evaluation.result import Result
from quantlens.evaluation.run import evaluate
from quantlens.export.bench import Contender
from quantlens.metrics import first_score, summary_of
from quantlens.metrics.divergence import sqnr_db
from quantlens.studies.board import dig
from quantlens.studies.choices import pareto
from quantlens.studies.text import BASELINE

HIGHEST_DB = 60.0
"""SQNR beyond which nothing is told apart: the rounding of float operations, and of logits kept in half precision."""
OF_QUALITY = ("aupr_out", "sqnr_db", "agreement")
"""What :func:`quality` gives beside the two metrics that a task is summed up by."""


def evaluated(
    contenders: Sequence[Contender],
    id: Any,
    ood: Mapping[str, Any] | None,
    *,
    threads: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Result]:
    """Fingerprint -> evaluation of every contender on the CPU, all on the same images, which are decoded once. The
    first one, where it is the float model, is what the others are compared with (`Result.fp32`). Results keep what
    each said of every ID image. id, ood: as for `evaluate`. Raises QuantlensError as that does."""
    import torch

    models = [one.model(threads) for one in contenders if one.model is not None]
    prepared = models[0].preprocess

    def opened(value: Any, name: str) -> Any:
        told = None if progress is None else partial(progress, f"decoding {name}")
        return as_image_set(value, prepared, name, progress=told)

    images = opened(id, "the ID set")
    others = {name: opened(value, f"OOD set {name}") for name, value in (ood or {}).items()}
    told = None if progress is None else _Count(progress, len(models) * sum(map(len, (images, *others.values()))))
    found: dict[str, Result] = {}
    reference: Any = False
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for one, model in zip(contenders, models, strict=True):
            result = evaluate(model, images, others, reference=reference, device="cpu", progress=told, keep=True)
            if reference is False and one.facts.get("bits") == BASELINE:
                reference = result
            found[one.facts["fingerprint"]] = result
    finally:
        torch.set_num_threads(before)
    return found


class _Count:
    """Progress of all evaluations as one."""

    def __init__(self, progress: Callable[[str, int, int], None], total: int) -> None:
        self.progress, self.total, self.sets = progress, total, 0

    def __call__(self, what: str, done: int, total: int) -> None:
        self.progress("evaluating", self.sets + done, self.total)
        self.sets += total if done == total else 0


def quality(result: Result, reference: Result | None) -> dict[str, float | None]:
    """The two metrics of the ID images that the task is summed up by, ``aupr_out`` (mean of the OOD sets, by MSP or the
    task's first score), and against the float model ``sqnr_db`` of the logits (dB, at most :data:`HIGHEST_DB`) and
    ``agreement`` of the predictions; None where there is none. Fractions."""
    means = dig(vars(result), ("ood_mean", "all")) or {}
    score = first_score(means) if means else ""
    found: dict[str, float | None] = {name: result.id.get(name) for name in summary_of(result.task)[:2]}
    found |= dict.fromkeys(OF_QUALITY) | {"aupr_out": dig(means, (score, "aupr_out"))}
    own, true = (None if one is None or one.outputs is None else one.outputs.logits for one in (result, reference))
    if own is not None and true is not None and own.shape == true.shape:
        a, b = own.astype(np.float64), true.astype(np.float64)
        noise = float(((a - b) ** 2).sum())
        found["sqnr_db"] = min(sqnr_db(float((b**2).sum()), noise) or 0.0, HIGHEST_DB) if noise else HIGHEST_DB
        if result.task in ("classify", "zero-shot"):
            found["agreement"] = float((own.argmax(1) == true.argmax(1)).mean())
    return found


def add_quality(
    timings: Sequence[dict[str, Any]], contenders: Sequence[Mapping[str, Any]], results: Mapping[str, Result]
) -> str:
    """Add to every timing the quality of what was timed, ``integers`` (`Artefact.facts`) and ``front``: whether it is
    on the Pareto front of its batch size and threads. Returns the metric that it weighs against the median latency:
    SQNR, or where one has none the first metric of the task."""
    reference = next((results[c["fingerprint"]] for c in contenders if c["bits"] == BASELINE), None)
    measured = {name: quality(result, reference) for name, result in results.items()}
    integers = {one["fingerprint"]: one.get("integers") for one in contenders}
    first = summary_of(next(iter(results.values())).task)[0]
    by = "sqnr_db" if all(one["sqnr_db"] is not None for one in measured.values()) else first
    for timing in timings:
        timing |= measured[timing["fingerprint"]] | {"integers": integers[timing["fingerprint"]]}
    for place in dict.fromkeys((t["batch"], t["threads"]) for t in timings):
        rows = [t for t in timings if (t["batch"], t["threads"]) == place]
        losses = [None if t[by] is None else (-t[by], t["median_ms"]) for t in rows]
        for i, (timing, best) in enumerate(zip(rows, pareto(losses), strict=True)):
            timing["front"] = None if best is None else best == i
    return by
