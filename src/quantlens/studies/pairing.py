"""What `compare` takes: two sides, each a store, some cells of a store, a result file, or a file of per-image outputs;
and which cell of the one answers to which of the other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlens.errors import QuantlensError, StorageError, UnknownNameError
from quantlens.evaluation import outputs as kept
from quantlens.evaluation.entries import TRAITS, Entry, Match
from quantlens.evaluation.outputs import Outputs
from quantlens.evaluation.result import Result


@dataclass(frozen=True)
class Side:
    """One of the two things compared."""

    name: str
    entries: tuple[Entry, ...]


# ---- sides -----------------------------------------------------------------------------------------------------------


def open_side(given: str | Path | Result) -> Side:
    """`DIR`, `DIR:key=value,…` (keys model, method, bits, seed; a key given twice takes either), `RESULT.json` of
    `quantlens evaluate --json`, `OUTPUTS.npz` of `quantlens evaluate --keep`, or a Result (with intervals where it was
    measured with `keep`).

    Raises QuantlensError for what is none of these, holds no finished cell, or selects none.
    """
    if isinstance(given, Result):
        return Side(given.title, (_entry(given.to_dict(), given.outputs),))
    text = str(given)
    place, chosen = _split(text)
    path = Path(place)
    if path.suffix == ".npz":
        return Side(text, (_of_outputs(path),))
    if path.is_file() and path.name != "store.sqlite":
        return Side(text, (_of_result(path),))
    return Side(text, _of_store(path.parent if path.name == "store.sqlite" else path, chosen))


def _split(text: str) -> tuple[str, dict[str, list[str]]]:
    place, colon, tail = text.rpartition(":")
    if not colon or "=" not in tail or Path(text).exists():
        return text, {}
    chosen: dict[str, list[str]] = {}
    for part in tail.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise QuantlensError(f"{text}: {part!r} selects nothing; write DIR:key=value,key=value")
        if key not in TRAITS:
            raise UnknownNameError("key of a selection", key, TRAITS)
        chosen.setdefault(key, []).append(value)
    return place, chosen


def _of_store(directory: Path, chosen: Mapping[str, list[str]]) -> tuple[Entry, ...]:
    from quantlens.studies.store import Store

    with Store(directory) as store:
        found = [
            entry_of(cell, directory) for cell in store.cells() if cell.status == "done" and cell.result is not None
        ]
    if not found:
        raise QuantlensError(f"the study in {directory} has no finished cell yet; run `quantlens study` first")
    for key, values in chosen.items():
        known = list(dict.fromkeys(str(getattr(entry, key)) for entry in found))
        lowered = {name.lower() for name in known}
        for value in values:
            if value.lower() not in lowered:
                raise UnknownNameError(f"{key} in {directory}", value, known)
    wanted = {key: {value.lower() for value in values} for key, values in chosen.items()}
    selected = [e for e in found if all(str(getattr(e, key)).lower() in values for key, values in wanted.items())]
    if not selected:
        raise QuantlensError(
            f"no cell of {directory} is all of {', '.join(f'{k}={v}' for k, vs in chosen.items() for v in vs)}; "
            "leave a key out"
        )
    return tuple(selected)


def entry_of(cell: Any, directory: Path | None) -> Entry:
    """The entry of a finished cell, with the outputs that are kept beside its store."""
    spec = cell.spec
    file = None if directory is None else kept.path_of(directory, cell.key)
    return Entry(
        str(spec["model"]),
        str(spec["method"]),
        str(spec["bits"]),
        int(spec["seed"]),
        cell.result,
        file if file is not None and file.is_file() else None,
    )


def _of_outputs(path: Path) -> Entry:
    about = kept.read(path).about
    return Entry(str(about["model"]), str(about["method"]), str(about["bits"]), int(about["seed"]), None, path)


def _of_result(path: Path) -> Entry:
    try:
        result = Result.from_dict(json.loads(path.read_text(encoding="utf-8"))).to_dict()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{path} is no result of quantlens ({error}); give the directory of a study, a file of `quantlens evaluate "
            "--json`, or one of --keep"
        ) from error
    return _entry(result, None)


def _entry(result: Mapping[str, Any], outputs: Outputs | None) -> Entry:
    model, method, bits = (str(result[name]) for name in TRAITS[:3])
    return Entry(model, method, bits, int(result["seed"]), result, None, outputs)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def match(a: Side, b: Side) -> tuple[list[Match], list[str]]:
    """(matches, what was left over in words).

    Cells answer to each other when they agree in model, method, bits and seed. A trait of which each side has one value
    only, and not the same one, is what is compared, and need not agree. FP32 alone on one side answers to every cell of
    the same model on the other; beside quantized cells it answers to FP32.

    Raises QuantlensError where nothing is left to compare.
    """
    matches: dict[tuple[str, ...], Match] = {}
    left: list[str] = []
    for first, second in _families(a, b):
        free = {trait for trait in TRAITS if _compared(trait, first, second)}
        shared = [trait for trait in TRAITS if trait not in free]
        table: dict[tuple[str, ...], list[Entry]] = {}
        for entry in second:
            table.setdefault(tuple(str(getattr(entry, t)) for t in shared), []).append(entry)
        for entry in first:
            partners = table.pop(tuple(str(getattr(entry, t)) for t in shared), [])
            if not partners:
                left.append(f"{entry} (A)")
            for other in partners:
                title = _title(entry, other)
                matches.setdefault(tuple(title.values()), Match(title)).pairs.append((entry, other))
        left += [f"{entry} (B)" for entries in table.values() for entry in entries]
    if not matches:
        raise QuantlensError(
            f"no cell of {a.name} answers to one of {b.name}: cells pair by model, method, bits and seed, but for what "
            "each side has one value of only; select with DIR:method=…,bits=…,model=…,seed=…"
        )
    return list(matches.values()), left


def _families(a: Side, b: Side) -> Iterable[tuple[list[Entry], list[Entry]]]:
    """The lists that are matched with each other."""
    first, second = list(a.entries), list(b.entries)
    if all(e.baseline for e in first) != all(e.baseline for e in second):
        flipped = all(e.baseline for e in second)
        base, others = (second, first) if flipped else (first, second)
        others = [e for e in others if not e.baseline]
        by_model = {e.model: e for e in base}
        if len(base) == 1 and len({e.model for e in others}) == 1:
            by_model = {others[0].model: base[0]}
        for entry in others:
            stand_in = [by_model[entry.model]] if entry.model in by_model else []
            yield ([entry], stand_in) if flipped else (stand_in, [entry])
        return
    for baseline in (True, False):
        yield [e for e in first if e.baseline == baseline], [e for e in second if e.baseline == baseline]


def _compared(trait: str, first: list[Entry], second: list[Entry]) -> bool:
    values = [{getattr(entry, trait) for entry in entries} for entries in (first, second)]
    return len(values[0]) == len(values[1]) == 1 and values[0] != values[1]


def _title(first: Entry, second: Entry) -> dict[str, str]:
    """Model, method and bits, each as one name, or as `A → B` where they differ."""

    def named(trait: str) -> str:
        one, two = str(getattr(first, trait)), str(getattr(second, trait))
        return one if one == two else f"{one} → {two}"

    return {trait: named(trait) for trait in TRAITS[:3]}
