"""A Ray cluster to run on: the one that is there, or one started on this machine for the time of a study."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from quantlens.errors import QuantlensError
from quantlens.evaluation.environment import cores
from quantlens.studies.config import ResourcesSpec
from quantlens.studies.executors.local import environment

LOCAL = "local"
STORE_BYTES = 512 << 20
"""Shared memory of a cluster that we start: results travel through it (some 100 kB each, with the logits of 50 000
images some 90 MB)."""


@dataclass(frozen=True)
class Share:
    """What each of `workers` asks Ray for: whole processors (its threads) and a part of a GPU."""

    workers: int
    cpus: int
    gpus: float

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.workers} Ray workers, each with {self.cpus} CPU{gpus}"


def load_ray() -> Any:
    """The ray package; QuantlensError with the cure where it is not installed."""
    try:
        return import_module("ray")
    except ImportError:
        raise QuantlensError("--executor ray needs Ray; run `pip install 'quantlens[cluster]'`") from None


@contextmanager
def connected(ray: Any, address: str | None, workers: int | None, resources: ResourcesSpec) -> Iterator[None]:
    """Inside, Ray is connected: to the cluster at `address` (or $RAY_ADDRESS; "auto" finds the one of this machine),
    or, without an address, to one of this machine's own that ends with the study. A connection that was there is used,
    and left."""
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "warning"}
    if address == LOCAL:
        wanted = (workers or 1) * (resources.cpu or 1)
        settings |= {"num_cpus": max(cores(), wanted), "object_store_memory": STORE_BYTES}
    with environment({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}):
        try:
            ray.init(**settings)
        except (ConnectionError, RuntimeError, ValueError) as error:
            place = "on this machine" if address == LOCAL else f"at {address}"
            raise QuantlensError(
                f"no Ray cluster {place} ({str(error).splitlines()[0]}); start one with `ray start --head`, or leave "
                "--address out"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


def share(ray: Any, workers: int | None, resources: ResourcesSpec, device: str, cells: int) -> Share:
    """How the cluster is divided: `workers` of them, or as many as find room, at most one per cell.

    A worker has one processor unless `resources` says how many or `workers` leaves each of them more; a whole GPU
    where the cluster has GPUs, unless `resources` says which part or the study's `device` is the CPU. Raises
    QuantlensError for what the cluster does not have.
    """
    total = ray.cluster_resources()
    all_cpus, all_gpus = int(total.get("CPU", 0)), float(total.get("GPU", 0))
    nodes = [node["Resources"] for node in ray.nodes() if node.get("Alive")]
    most_cpus = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    most_gpus = max((float(node.get("GPU", 0)) for node in nodes), default=0.0)

    gpus = resources.gpu
    if gpus is None:
        gpus = 1.0 if all_gpus and not device.startswith("cpu") else 0.0
    if gpus > most_gpus:
        raise QuantlensError(
            f"a worker asks for {gpus:g} GPU, but the largest node of the Ray cluster has {most_gpus:g}; lower "
            "`resources: {gpu: …}` or --gpus-per-worker"
        )
    if workers is None:
        cpus = resources.cpu or 1
        room = [all_cpus // cpus, *([int(all_gpus / gpus)] if gpus else [])]
        count = max(1, min(*room, cells) if len(room) > 1 else min(room[0], cells))
    else:
        count = max(1, min(workers, cells))
        cpus = resources.cpu or max(1, min(all_cpus // count, most_cpus))
    if cpus > most_cpus:
        raise QuantlensError(
            f"a worker asks for {cpus} CPU, but the largest node of the Ray cluster has {most_cpus}; lower "
            "`resources: {cpu: …}`"
        )
    return Share(count, cpus, gpus)
