"""Runs a study: every model, method, precision and seed, each finished cell written to the store at once.

A cell's key is a hash of everything that determines its metrics; so a finished cell is never run again, a study that
was killed carries on where it was, and a changed study runs only what changed.

For each model: load it once per worker, decode each image set once, measure FP32 once; its Result is the reference of
all quantized cells of that model. Where that is done is the executor's business (`executors/`); cells, keys and metrics
are the same wherever they ran.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantlens.ambient import isolated
from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.plugins import given
from quantlens.studies.backend import Backend
from quantlens.studies.config import StudyConfig, parse_config
from quantlens.studies.executors.driver import Driver
from quantlens.studies.executors.local import processes
from quantlens.studies.executors.ray import actors
from quantlens.studies.progress import Quiet, display
from quantlens.studies.session import Session, Summary

__all__ = ["StudyInterrupted", "Summary", "run_study"]


EXECUTORS = ("local", "ray")
"""The names that `run_study` and `--executor` take."""


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C during a study. `str()` says what is in the store and how to carry on."""


@isolated
def run_study(
    config: StudyConfig | Mapping[str, Any],
    out_dir: str | os.PathLike[str],
    *,
    workers: int | None = None,
    executor: str = "local",
    address: str | None = None,
    gpus_per_worker: float | None = None,
    progress: bool | Quiet = True,
    retry_failed: bool = False,
    limit: int | None = None,
    backend: Backend | None = None,
) -> Summary:
    """Run what is not finished yet of a study, and keep it in `out_dir/store.sqlite`.

    executor: "local", or "ray" for a Ray cluster. workers: that share the work, by default one, in this process, and on
    a cluster as many as find room there. address: of the cluster ("auto": the one this machine belongs to); without it
    one is started for the time of the study. gpus_per_worker: instead of `resources: {gpu: …}` of the study.
    progress: a live bar on stderr, or a display of your own. retry_failed: run cells again that failed before. limit:
    run at most so many cells now.

    A cell that raises is recorded as failed with its traceback and the rest goes on. What would stop every cell (images
    that cannot be read, a full disk, another process that runs a study in `out_dir`) raises QuantlensError. Ctrl-C
    raises `StudyInterrupted`; the store is whole at every moment, and the same call carries on.
    """
    started = time.monotonic()
    if not isinstance(config, StudyConfig):
        config = parse_config(dict(config))
    # what was loaded in this process, workers must load too
    config = config.model_copy(update={"plugins": tuple(dict.fromkeys([*config.plugins, *given()]))})
    for name, value in (("workers", workers), ("limit", limit)):
        if value is not None and value < 1:
            raise QuantlensError(f"{name} is {value}; give at least 1")
    if executor not in EXECUTORS:
        raise UnknownNameError("executor", executor, EXECUTORS)
    resources = config.resources
    if gpus_per_worker is not None:
        asked = {"resources": {"cpu": resources.cpu, "gpu": gpus_per_worker}}
        resources = parse_config(config.to_dict() | asked, where=f"--gpus-per-worker {gpus_per_worker:g}").resources
    if executor == "local" and (address is not None or gpus_per_worker is not None):
        raise QuantlensError("an address and GPUs per worker are for a cluster; add --executor ray")
    session = Session(
        config,
        Path(out_dir),
        backend or Backend(),
        display(progress),
        retry_failed=retry_failed,
        limit=limit,
        device="cpu" if executor == "ray" else None,  # the driver's machine may lack the GPU that its workers have
    )
    try:
        with session.running():
            ray = executor == "ray"
            room = actors(session, workers, address, resources) if ray else processes(session, workers)
            with room as (slots, what):
                Driver(session, slots, what).run()
    except KeyboardInterrupt:
        raise StudyInterrupted(session.interrupted()) from None
    return replace(session.summary(), seconds=time.monotonic() - started)
