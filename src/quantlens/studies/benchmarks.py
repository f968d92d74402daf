"""Exported files in a study's store: what each is, its evaluation, and how long it takes.

An artefact is known by its fingerprint (SHA-256 of the file), so that `quantlens evaluate FILE --store DIR` and
`quantlens bench FILE --store DIR` may come in either order, from several processes. Timings belong to a run: only those
of one run were interleaved, so ratios are taken within it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantlens.studies.store import Store, now, packed, to_json


@dataclass(frozen=True)
class Timed:
    """A timing of a run: a row of `export.bench.bench`, the machine and time of the run, what was timed, and its
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
    """Record one run of the benchmark, all of it or nothing: a row of `export.bench.bench` for every contender,
    what each of them is, and the machine (`environment()`). Returns the run's name."""
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
    rows = _rows(
        store,
        "SELECT t.run, t.timing, a.facts, a.result FROM timings t JOIN artefacts a ON a.fingerprint = t.fingerprint "
        "ORDER BY t.run, json_extract(t.timing, '$.position')",
    )
    return [Timed(run, one["timing"], one["machine"], one["created"], *artefact) for run, one, *artefact in rows]


def evaluated(store: Store) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(facts, evaluation) of every artefact that was evaluated, oldest first."""
    rows = _rows(store, "SELECT '', facts, result FROM artefacts WHERE result IS NOT NULL ORDER BY created, rowid")
    return [(facts, result) for _, facts, result in rows]


def _rows(store: Store, query: str) -> Iterator[tuple[Any, ...]]:
    """What a query finds: a name, then JSON. Nothing in a store of before there were benchmarks."""
    if store.rows("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'timings'"):
        for name, *columns in store.rows(query):
            yield (name, *(store.read(column, "a benchmark") for column in columns))
