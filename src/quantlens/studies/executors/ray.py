"""Workers on a Ray cluster. SQLite must not be shared over a network, and a result is small, so results travel to the
driver, one cell at a time, as they finish."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from quantlens.studies.config import ResourcesSpec
from quantlens.studies.executors.cluster import connected, load_ray, share
from quantlens.studies.executors.worker import Worker
from quantlens.studies.session import Session


@contextmanager
def actors(
    session: Session, workers: int | None, address: str | None, resources: ResourcesSpec
) -> Iterator[tuple[list[Actor], str]]:
    """Workers on the cluster at `address` (see `cluster.connected`), and what each has in words; workers None: as many
    as find room. Each begins as soon as there is room for it."""
    ray = load_ray()
    with connected(ray, address, workers, resources):
        part = share(ray, workers, resources, session.config.device, len(session.tasks))
        remote = ray.remote(Worker).options(num_cpus=part.cpus, num_gpus=part.gpus, max_restarts=0)
        arguments = (session.config, session.backend, part.cpus, session.images.marks())
        slots = [Actor(ray, remote, arguments) for _ in range(part.workers)]
        try:
            yield slots, str(part)
        finally:
            for slot in slots:
                slot.end()


class Actor:
    """A Ray actor. arguments: of its Worker."""

    def __init__(self, ray: Any, remote: Any, arguments: tuple[Any, ...]) -> None:
        self.ray, self.remote, self.arguments = ray, remote, arguments
        self.handle = remote.remote(*arguments)

    def submit(self, method: str, *arguments: Any) -> Future[Any]:
        answer: Future[Any] = getattr(self.handle, method).remote(*arguments).future()
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
