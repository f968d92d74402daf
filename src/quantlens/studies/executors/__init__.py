"""Where the cells of a study run: in this process, in several processes of this machine, or on a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantlens.studies.config import ResourcesSpec
    from quantlens.studies.session import Session

EXECUTORS = ("local", "ray")
"""The names that `run_study` and `--executor` take."""


def execute(
    session: Session, executor: str, workers: int | None, address: str | None, resources: ResourcesSpec
) -> None:
    """Run what is left of a session. See `runner.run_study`."""
    from quantlens.studies.executors.driver import Driver

    if executor == "ray":
        from quantlens.studies.executors.ray import actors

        with actors(session, workers, address, resources) as (slots, what):
            Driver(session, slots, what).run()
        return
    from quantlens.studies.executors.local import Here, processes

    if workers in (None, 1):
        Driver(session, [Here(session)]).run()
        return
    assert workers is not None
    with processes(session, workers) as own:
        Driver(session, own, f"{workers} processes").run()
