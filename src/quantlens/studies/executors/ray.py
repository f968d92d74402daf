"""Workers on a Ray cluster: the one that is there, or one started on this machine for the time of a study. SQLite must
not be shared over a network, and a result is small, so results travel to the driver, one cell at a time."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from quantlens.errors import QuantlensError
from quantlens.evaluation.environment import cores
from quantlens.studies.config import ResourcesSpec
from quantlens.studies.executors.local import environment
from quantlens.studies.measuring import Worker
from quantlens.studies.session import Session

LOCAL = "local"
STORE_BYTES = 512 << 20
"""Shared memory of a cluster that we start: results travel through it (some 100 kB each, with the logits of 50 000
images some 90 MB)."""


@contextmanager
def actors(
    session: Session, workers: int | None, address: str | None, resources: ResourcesSpec
) -> "Iterator[tuple[list[Actor], str]]":
    """Workers on the cluster at `address` (see `connected`), and what each has in words; workers None: as many as find
    room. Each begins as soon as there is room for it."""
    try:
        ray = import_module("ray")
    except ImportError:
        raise QuantlensError("--executor ray needs Ray; run `pip install 'quantlens[cluster]'`") from None
    with connected(ray, address, workers, resources):
        count, cpus, gpus = share(ray, workers, resources, session.config.device, len(session.tasks))
        remote = ray.remote(Worker).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0)
        arguments = (session.config, session.backend, cpus, session.images.marks)
        slots = [Actor(ray, remote, arguments) for _ in range(count)]
        more = f" and {gpus:g} GPU" if gpus else ""
        try:
            yield slots, f"{count} Ray workers, each with {cpus} CPU{more}"
        finally:
            for slot in slots:
                slot.end()


class Actor:
    """A Ray actor. arguments: of its Worker."""

    def __init__(self, ray: Any, remote: Any, arguments: tuple[Any, ...]) -> None:
        self.ray, self.remote, self.arguments = ray, remote, arguments
        self.handle = remote.remote(*arguments)

    def submit(self, method: str, *arguments: Any) -> Future[Any]:
        answer: Future[Any] = self.handle.call.remote(method, *arguments).future()
        return answer

    def death(self, error: BaseException) -> str:
        if not isinstance(error, self.ray.exceptions.RayError) or isinstance(error, self.ray.exceptions.RayTaskError):
            return ""
        return f"died ({' '.join(str(error).split())})"

    def replace(self) -> None:
        self.end()
        self.handle = self.remote.remote(*self.arguments)

    def end(self) -> None:
        """End the worker, or the wait for it."""
        self.ray.kill(self.handle)


# ---- the cluster -----------------------------------------------------------------------------------------------------


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
    handler = signal.getsignal(signal.SIGTERM)
    with environment({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}):
        try:
            ray.init(**settings)
        except (ConnectionError, RuntimeError, ValueError) as error:
            place = "on this machine" if address == LOCAL else f"at {address}"
            raise QuantlensError(
                f"no Ray cluster {place} ({str(error).splitlines()[0]}); start one with `ray start --head`, or leave "
                "--address out"
            ) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray puts one of its own there, which exits at once
        try:
            yield
        finally:
            ray.shutdown()


def share(ray: Any, workers: int | None, resources: ResourcesSpec, device: str, cells: int) -> tuple[int, int, float]:
    """How the cluster is divided: (workers, processors and part of a GPU that each asks Ray for); `workers` of them, or
    as many as find room, at most one per cell.

    A worker has one processor unless `resources` says how many or `workers` leaves each of them more; a whole GPU
    where the cluster has GPUs, unless `resources` says which part or the study's `device` is the CPU. Raises
    QuantlensError for what the cluster does not have.
    """
    total = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node.get("Alive")]
    most = {kind: max((float(node.get(kind, 0)) for node in nodes), default=0.0) for kind in ("CPU", "GPU")}

    gpus = resources.gpu
    if gpus is None:
        gpus = 1.0 if total.get("GPU") and not device.startswith("cpu") else 0.0
    cpus = resources.cpu or 1
    if workers is None:
        count = int(min(total.get("CPU", 0) // cpus, total.get("GPU", 0) / gpus if gpus else cells, cells))
    else:
        count = min(workers, cells)
        cpus = resources.cpu or max(1, int(min(total.get("CPU", 0) // max(1, count), most["CPU"])))
    for kind, asked in (("GPU", gpus), ("CPU", cpus)):
        if asked > most[kind]:
            cure = " or --gpus-per-worker" if kind == "GPU" else ""
            raise QuantlensError(
                f"a worker asks for {asked:g} {kind}, but the largest node of the Ray cluster has {most[kind]:g}; "
                f"lower `resources: {{{kind.lower()}: …}}`{cure}"
            )
    return max(1, count), cpus, gpus
