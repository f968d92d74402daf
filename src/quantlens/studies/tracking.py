"""A store as runs of an MLflow experiment: one run per finished cell, each logged once however often this is called."""

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from quantlens.errors import QuantlensError, UnsupportedError, first_line
from quantlens.evaluation.result import numbers
from quantlens.studies.store import Store

KEY = "quantlens.cell"
"""The tag that names a run's cell; by it a cell that has been logged is known again."""

BATCH = 100
"""Metrics in one request (MLflow takes 1000 things at once, 100 of them parameters)."""

PARAMS = ("model", "architecture", "weights", "checkpoint_sha256", "method", "bits", "seed")
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)


def log(directory: str | Path, uri: str, *, experiment: str | None = None, client: Any = None) -> tuple[int, int]:
    """Log the finished cells of the current study of a store. Returns (runs logged now, runs logged before).

    uri: a tracking server (http://…), a database (sqlite:///mlflow.db) or whatever else MLflow tracks to. experiment:
    by default the study's name. client: an `MlflowClient` of one's own. A run that was cut short is completed.

    Raises UnsupportedError where MLflow is not installed, QuantlensError where it cannot be reached or nothing is
    finished.
    """
    with Store(directory) as store:
        cells = [cell for cell in store.cells() if cell.done]
        name = experiment or str(store.study().get("name") or "quantlens")
    if not cells:
        raise QuantlensError("no cell is finished yet, so there is nothing to log; run `quantlens study` first")
    try:
        client = client or _client(uri)
        known = client.get_experiment_by_name(name)
        number = client.create_experiment(name) if known is None else known.experiment_id
        runs = {run.data.tags.get(KEY): run.info for run in _runs(client, number)}
        missing = [c for c in cells if c.key not in runs or runs[c.key].status != "FINISHED"]
        for cell in missing:
            _log(client, number, cell, runs[cell.key].run_id if cell.key in runs else None)
    except UnsupportedError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise QuantlensError(
            f"MLflow at {uri} failed ({reason}); check the address and the server, and run the same command again: "
            "cells that were logged are not logged twice"
        ) from error
    return len(missing), len(cells) - len(missing)


def _client(uri: str) -> Any:
    try:
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise UnsupportedError(
            "logging to MLflow needs the package mlflow (or mlflow-skinny): run `pip install 'quantlens[mlflow]'`"
        ) from error
    return MlflowClient(tracking_uri=uri)


def _runs(client: Any, experiment: str) -> Iterator[Any]:
    page = client.search_runs([experiment])
    yield from page
    while page.token:
        page = client.search_runs([experiment], page_token=page.token)
        yield from page


def _log(client: Any, experiment: str, cell: Any, run: str | None) -> None:
    from mlflow.entities import Metric, Param

    spec = cell.spec
    ended = int(1000 * datetime.fromisoformat(cell.created).timestamp())
    if run is None:
        title = f"{spec['model']} {spec['method']} {spec['bits']} seed {spec['seed']}"
        began = ended - int(1000 * cell.seconds)
        run = client.create_run(experiment, start_time=began, tags={KEY: cell.key}, run_name=title).info.run_id
    params = {name: spec.get(name) for name in PARAMS}
    params |= {f"option.{name}": value for name, value in (spec.get("options") or {}).items()}
    client.log_batch(run, params=[Param(_name(k), str(v)[:500]) for k, v in params.items() if v is not None])
    metrics = [Metric(_name(path), float(value), ended, 0) for path, value in numbers(cell.result)]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run, metrics=metrics[start : start + BATCH])
    client.set_terminated(run, status="FINISHED", end_time=ended)


def _name(text: str) -> str:
    """A name that MLflow takes."""
    return _NOT_IN_NAMES.sub("_", text)[:250]
