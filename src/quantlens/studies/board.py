"""The cells of a store, grouped as the report shows them: one group per model and method, its seeds under
each precision."""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

from quantlens.errors import QuantlensError, StorageError
from quantlens.metrics import metric_of, summary_of
from quantlens.studies.benchmarks import Timed, evaluated, timed
from quantlens.studies.store import Store
from quantlens.studies.text import BASELINE, Stat, number, plain, precision_order, score_order

Path = tuple[str, ...]

_SEED_IN_SOURCE = re.compile(r"([?&])seed=\d+&?")


def dig(tree: Any, path: Path) -> Any:
    """The value at `path` in nested dicts, or None where a key is absent."""
    return reduce(lambda found, key: found.get(key) if isinstance(found, Mapping) else None, path, tree)


@dataclass
class Group:
    """One row of the tables, one line of the charts: a model quantized by a method, with everything but bits
    and seed fixed.

    `cells[bits]` are result dicts in order of seed; `fp32` is the FP32 result of the same checkpoint on the
    same images (the FP32 cell, or the copy that a quantized cell carries), `fp32_own` tells which.
    """

    model: str
    method: str
    traits: dict[str, Any]
    index: int = 0
    cells: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    fp32: dict[str, Any] | None = None
    fp32_own: bool = False
    of_model: str = ""
    """what FP32 has the same of"""

    @property
    def name(self) -> str:
        return f"{self.model} · {self.method}"

    @property
    def quantized(self) -> list[dict[str, Any]]:
        """The results at all precisions but FP32."""
        return [result for results in self.cells.values() for result in results]

    def results(self, bits: str) -> list[dict[str, Any]]:
        """The results at a precision, in order of seed."""
        if bits == BASELINE:
            return [] if self.fp32 is None else [self.fp32]
        return self.cells.get(bits, [])

    def first(self, bits: str) -> dict[str, Any] | None:
        """The result of the lowest seed at this precision."""
        return next(iter(self.results(bits)), None)


@dataclass
class Board:
    """Everything the report shows, with look-ups; no number is made here but means and differences."""

    groups: list[Group]
    done: list[Any]
    failed: list[Any]
    study: dict[str, Any]
    timings: Sequence[Timed] = ()
    artefacts: Sequence[tuple[dict[str, Any], dict[str, Any]]] = ()
    inspections: Sequence[Any] = ()
    """finished cells of the store that say which layer hurts (`Store.inspections`)"""
    unsure: frozenset[tuple[int, str, str]] = frozenset()
    """changes that may be chance: (group, precision, path of the metric); see `marks`"""
    unsure_note: str = ""
    directory: pathlib.Path | None = None
    """of the store"""

    def __post_init__(self) -> None:
        self.models = _unique(g.model for g in self.groups)
        self.methods = _unique(g.method for g in self.groups)
        self.quantized = sorted(_unique(b for g in self.groups for b in g.cells), key=precision_order)
        has_baseline = any(g.fp32 is not None for g in self.groups)
        self.precisions = ([BASELINE] if has_baseline else []) + self.quantized
        self.cells = [(g, bits, r) for g in self.groups for bits, results in g.cells.items() for r in results]
        """(group, precision, result) of every quantized cell"""
        self.results = [r for *_, r in self.cells] + [r for g in self.groups for r in g.results(BASELINE)]
        self.task: str | None = next((r["task"] for r in self.results if r.get("task")), None)
        """What the models were measured as; None of results before there were tasks."""
        self.summary = summary_of(self.task)
        self.judged = metric_of(self.summary[0]).title
        """The metrics of the ID images that sum a model up, the one that it is judged by first."""
        self.seeds = sorted({r["seed"] for *_, r in self.cells})
        kinds: dict[str, str] = {}
        scores: set[str] = set()
        for result in self.results:
            for name, entry in _items(result.get("ood")):
                kinds[name] = kinds.get(name) or str(entry.get("group") or "")
            for _, entry in (*_items(result.get("ood")), *_items(result.get("ood_mean"))):
                scores.update(score for score, _ in _items(entry))
        rank = {"far": 0, "near": 1}
        self.sets = dict(sorted(kinds.items(), key=lambda item: rank.get(item[1], 2)))
        """OOD set → "far" or "near" ("" if not stated), far sets first"""
        self.scores = sorted(scores, key=score_order)
        self.score: str | None = next(iter(self.scores), None)
        """The score shown first: MSP as in the paper, else the first there is."""
        paths = (("ood_mean", part, self.scores[0], "aupr_out") for part in self.parts() if self.scores)
        self.ood_path: Path | None = next(paths, None)
        """Path of the headline OOD metric: AUPR-out of the far sets, else of all or near ones."""
        widths = [b for b in self.quantized if precision_order(b)[0] == 1]
        self.lowest: str | None = (widths or self.quantized or [None])[-1]
        """The lowest precision among the quantized cells."""

    def shown(self, group: Group, bits: str, path: Path, *, change: bool = False) -> Stat | None:
        """Mean and standard deviation over seeds of a stored metric, or of what quantization changed of it (quantized
        less FP32), as it is shown: a fraction as a percentage."""
        read = partial(change_of, group) if change else dig
        stat = Stat.of(read(result, path) for result in (group.cells.get(bits, ()) if change else group.results(bits)))
        return None if stat is None else stat.scaled(metric_of(path[-1]).factor)

    def level(self, path: Path) -> float | None:
        """A metric that is the same for every cell on the same images: its mean over the cells, as it is shown."""
        found = Stat.of(s.mean for g in self.groups for b in self.precisions if (s := self.shown(g, b, path)))
        return None if found is None else found.mean

    def parts(self) -> list[str]:
        """Which of the stored means over OOD sets there are: far, near; all only where neither is."""
        present = {name for r in self.results for name, entry in _items(r.get("ood_mean")) if entry}
        chosen: list[str] = [p for p in ("far", "near") if p in present]
        return chosen or (["all"] if "all" in present else [])


def open_store(store_or_dir: Any) -> tuple[Any, pathlib.Path | None]:
    """(store, its directory or None) of a directory or an object with `.cells()` and `.study()`. Raises StorageError
    for a directory without a store."""
    if isinstance(store_or_dir, str | os.PathLike):
        folder = pathlib.Path(store_or_dir)
        if not (folder / "store.sqlite").is_file():
            raise StorageError(f"{folder} holds no store.sqlite; give the --out directory of a `quantlens study`")
        return Store(folder), folder
    if not hasattr(store_or_dir, "cells"):
        raise QuantlensError(f"a {type(store_or_dir).__name__} is no study; give its --out directory, or its Store")
    return store_or_dir, store_or_dir.directory if isinstance(store_or_dir, Store) else None


def board_of(store_or_dir: Any) -> Board:
    """The board of a study. Raises QuantlensError for an empty store, StorageError for a directory without one."""
    store, folder = open_store(store_or_dir)
    cells = list(store.cells())
    more: tuple[Any, Any, Any] = ((), (), ())
    if isinstance(store, Store):
        more = timed(store), evaluated(store), store.inspections()
    if not cells and not any(more):
        raise QuantlensError(
            f"{folder or 'the store'} holds no cell yet, so there is nothing to show; run `quantlens study` first"
        )
    board = collect(cells, store.study(), *more)
    board.directory = folder
    return board


def change_of(group: Group, result: Mapping[str, Any], path: Path) -> float | None:
    """A metric of a cell less the same metric at FP32: that which the cell carries, else that of the FP32 cell. A
    stored difference is never read, as its sign was the opposite one in earlier releases."""
    fp32, value = number(dig(result, ("fp32", *path))), number(dig(result, path))
    if fp32 is None:
        fp32 = number(dig(group.fp32, path))
    return None if fp32 is None or value is None else value - fp32


def collect(
    cells: Iterable[Any],
    study: Mapping[str, Any] | None,
    timings: Sequence[Timed] = (),
    artefacts: Sequence[tuple[dict[str, Any], dict[str, Any]]] = (),
    inspections: Sequence[Any] = (),
) -> Board:
    """Group the store's cells. Of cells that differ in nothing but their date, the newest counts. timings, artefacts:
    what `studies.benchmarks` finds in the store. inspections: `Store.inspections`; those that failed are among the
    failed cells."""
    listed = list(cells)
    done = [c for c in listed if c.status == "done"]
    looked = [c for c in inspections if c.status == "done"]
    failed = [c for c in (*listed, *inspections) if c.status != "done"]
    newest = {}
    for cell in sorted(done, key=lambda c: str(c.created)):
        result, traits = _normal(cell)
        newest[_key(traits), result["bits"], result["seed"]] = result, traits

    groups: dict[str, Group] = {}
    baselines: dict[str, Group] = {}
    for (key, bits, _), (result, traits) in newest.items():
        of_model = _key({name: traits[name] for name in ("model", "checkpoint", "id")})
        if bits == BASELINE:
            baselines[of_model] = Group(traits["model"], "fp32", traits, fp32=result, fp32_own=True)
            continue
        group = groups.setdefault(key, Group(traits["model"], traits["method"], traits, of_model=of_model))
        group.cells.setdefault(bits, []).append(result)
        group.fp32 = result.get("fp32") or group.fp32
    for group in groups.values():
        group.cells = {bits: sorted(results, key=lambda r: r["seed"]) for bits, results in group.cells.items()}
        if group.of_model in baselines:
            group.fp32, group.fp32_own = baselines[group.of_model].fp32, True
    measured = {group.of_model for group in groups.values()}
    found = [*groups.values(), *(one for key, one in baselines.items() if key not in measured)]
    places = [_unique(str(c.spec.get(name)) for c in listed) for name in ("model", "method")]
    found.sort(key=lambda g: tuple((*p, n).index(n) for p, n in zip(places, (g.model, g.method), strict=True)))
    _tell_apart(found)
    for index, group in enumerate(found):
        group.index = index
    return Board(found, done, failed, dict(study or {}), timings, artefacts, looked)


def _normal(cell: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result with model, method, bits and seed as the spec names them, and the traits that make its
    group."""
    result = {**cell.result, "cell_key": cell.key}
    for key, default in (("model", "model"), ("method", "unknown"), ("bits", BASELINE), ("seed", 0)):
        stated = (cell.spec.get(key), result.get(key), default)
        result[key] = next(value for value in stated if value is not None)
    result["bits"] = BASELINE if result["method"] == "fp32" else str(result["bits"]).upper()
    traits = {
        "model": result["model"],
        "checkpoint": str(result.get("checkpoint_sha256") or cell.spec.get("checkpoint_sha256") or ""),
        "id": [dig(result, ("id", "source")), dig(result, ("id", "fingerprint"))],
        "method": result["method"],
        "options": cell.spec.get("options") or result.get("options") or {},
        "calibration": _calibration_source(result),
    }
    return result, traits


def _calibration_source(result: Mapping[str, Any]) -> str:
    """Where the calibration images came from and how many, without the seed of a random sample (that varies
    with the cell's)."""
    used = result.get("calibration") or {}
    bare = _SEED_IN_SOURCE.sub(r"\1", str(used.get("source") or "")).rstrip("?&")
    return f"{bare} ({used['n']} images)" if bare and "n" in used else bare


def _tell_apart(groups: Sequence[Group]) -> None:
    """Put what differs into the names of groups that would otherwise read alike (other weights, ID set,
    options, images)."""
    for model in _unique(g.model for g in groups):
        same = [g for g in groups if g.model == model]
        weights = len({g.traits["checkpoint"] for g in same}) > 1
        images = len({tuple(g.traits["id"]) for g in same}) > 1
        for g in same:
            g.model += f" [{g.traits['checkpoint'][:8] or 'unknown'}]" if weights else ""
            g.model += f" [{str(g.traits['id'][0] or 'unknown')[:60]}]" if images else ""
    for name in _unique(g.name for g in groups):
        same = [g for g in groups if g.name == name]
        options = sorted({k for g in same for k in g.traits["options"]})
        differing = [k for k in options if len({plain(g.traits["options"].get(k)) for g in same}) > 1]
        sources = len({g.traits["calibration"] for g in same}) > 1
        for g in same if len(same) > 1 else ():
            notes = [f"{k}={plain(g.traits['options'][k])}" for k in differing if k in g.traits["options"]]
            notes += [f"calibrated on {g.traits['calibration'] or 'unknown'}"] if sources else []
            g.method += f" ({', '.join(notes) or 'defaults'})"


def _key(traits: Mapping[str, Any]) -> str:
    return json.dumps(traits, sort_keys=True, default=str)


def _items(tree: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """The parts of a mapping that are mappings themselves."""
    return [(str(k), v) for k, v in (tree or {}).items() if isinstance(v, Mapping)]


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))
