"""Exported files in a study's store: what each is, its evaluation, and how long it takes.

An artefact is known by its fingerprint (SHA-256 of the file), so that `quantlens evaluate FILE --store DIR` and
`quantlens bench FILE --store DIR` may come in either order, from several processes. Timings belong to a run: only those
of one run were interleaved, so ratios are taken within it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantlens.errors import StorageError
from quantlens.studies.store import Store, now, packed, to_json, unpacked


@dataclass(frozen=True)
class Timed:
    """A timing of a run: the fields of `export.bench.Timing`, the machine and time of the run, what was timed, and its
    evaluation (`Result.to_dict()`; None: not evaluated)."""

    run: str
    timing: dict[str, Any]
    machine: dict[str, Any]
    created: str
    facts: dict[str, Any]
    result: dict[str, Any] | None

    @property
    def place(self) -> tuple[str, int, int]:
        """What timings must share to be compared: processor, batch size, threads."""
        return str(self.machine.get("cpu", "")), int(self.timing["batch"]), int(self.timing["threads"])


def put_artefact(store: Store, facts: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Record what an artefact is (`Artefact.facts()`) and its evaluation, in place of an earlier one."""
    with store.writing() as connection:
        connection.execute(
            "INSERT INTO artefacts (fingerprint, facts, result, created) VALUES (?, ?, ?, ?) ON CONFLICT (fingerprint) "
            "DO UPDATE SET facts = excluded.facts, result = excluded.result, created = excluded.created",
            (facts["fingerprint"], to_json(dict(facts)), packed(result), now()),
        )


def put_timings(
    store: Store,
    timings: Sequence[Mapping[str, Any]],
    facts: Iterable[Mapping[str, Any]],
    machine: Mapping[str, Any],
) -> str:
    """Record one run of the benchmark, all of it or nothing: `Timing.to_dict()` of every contender, what each of them
    is, and the machine (`environment()`). Returns the run's name."""
    run = now()
    with store.writing() as connection:
        for one in facts:
            connection.execute(
                "INSERT INTO artefacts (fingerprint, facts, result, created) VALUES (?, ?, NULL, ?) "
                "ON CONFLICT (fingerprint) DO UPDATE SET facts = excluded.facts",
                (one["fingerprint"], to_json(dict(one)), run),
            )
        for position, timing in enumerate(timings):
            stored = {"timing": dict(timing), "machine": dict(machine), "created": run, "position": position}
            connection.execute(
                "INSERT INTO timings (run, fingerprint, batch, threads, timing) VALUES (?, ?, ?, ?, ?)",
                (run, timing["fingerprint"], timing["batch"], timing["threads"], to_json(stored)),
            )
    return run


def timed(store: Store) -> list[Timed]:
    """All timings, run by run in the order in which they were taken. A store of before there were any has none."""
    if not _known(store):
        return []
    rows = store.rows(
        "SELECT t.run, t.timing, a.facts, a.result FROM timings t JOIN artefacts a ON a.fingerprint = t.fingerprint"
    )
    found = []
    for run, timing, facts, result in rows:
        stored = _read(store, timing)
        key = (run, stored["position"])
        one = Timed(
            run, stored["timing"], stored["machine"], stored["created"], _read(store, facts), _read(store, result)
        )
        found.append((key, one))
    return [one for _, one in sorted(found, key=lambda item: item[0])]


def evaluated(store: Store) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(facts, evaluation) of every artefact that was evaluated, oldest first."""
    if not _known(store):
        return []
    rows = store.rows("SELECT facts, result FROM artefacts WHERE result IS NOT NULL ORDER BY created, rowid")
    return [(_read(store, facts), _read(store, result)) for facts, result in rows]


def _known(store: Store) -> bool:
    return bool(store.rows("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'timings'"))


def _read(store: Store, text: str | bytes | None) -> Any:
    try:
        return unpacked(text)
    except (zlib.error, ValueError) as problem:
        raise StorageError(
            f"the store {store.path} is damaged (a benchmark: {problem}); move it away and run the benchmark again"
        ) from problem
