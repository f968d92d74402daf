"""What changed between two models, methods or studies that were kept in files: stores, some cells of a store, result
files, or files of per-image outputs; and which cell of the one answers to which of the other."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quantlens.arguments import checked
from quantlens.errors import QuantlensError, StorageError, UnknownNameError
from quantlens.evaluation import outputs as kept
from quantlens.evaluation.compare import RESAMPLES, TRAITS, Comparison, Entry, Match, compare_matches
from quantlens.evaluation.logits_files import is_logits
from quantlens.evaluation.open_models import measurable
from quantlens.evaluation.result import Result
from quantlens.evaluation.run import evaluate
from quantlens.metrics.operating import KEEP, Promise
from quantlens.studies.store import Store

FOREIGN = (".onnx", ".xml", ".npz", ".csv")


class Side(NamedTuple):
    """One of the two things compared."""

    name: str
    entries: list[Entry]


@checked
def compare(
    a: Any,
    b: Any,
    *,
    id: Any = None,
    ood: Mapping[str, Any] | None = None,
    scores: Sequence[str] | None = None,
    coverage: float | None = None,
    accuracy: float | None = None,
    keep: float = KEEP,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    **evaluating: Any,
) -> Comparison:
    """Compare two sides: stores, cells of a store, files or Results, as `open_side` takes them.

    With `id` (and `ood`), the images, a side may also be a model, or a file or name of one, as `evaluate` takes it: it
    is measured on them first. A float model on one side is the one that a foreign model on the other came from.
    coverage or accuracy, keep: what thresholds are set to, on FP32 where it is one side, else on A (see
    `metrics.operating.Promise`). evaluating: further arguments of `evaluate` (fit, reference, batch_size …). The other
    arguments are those of `evaluation.compare.compare_matches`.

    Raises QuantlensError for sides that cannot be read or share no images, StorageError for damaged files.
    """
    promise = Promise(coverage, accuracy, keep)
    if id is not None:
        evaluating |= {"scores": None if scores is None or list(scores) == ["all"] else scores, "progress": progress}
        a, b = _measured(a, b, id, ood, **evaluating)
    elif evaluating or ood:
        raise QuantlensError(f"{', '.join(evaluating) or 'ood'} without id: give the ID images that models are run on")
    first, second = open_side(a), open_side(b)
    matches, unpaired = match(first, second)
    return compare_matches(
        matches,
        a=first.name,
        b=second.name,
        unpaired=unpaired,
        scores=scores,
        promise=promise,
        resamples=resamples,
        seed=seed,
        progress=progress,
    )


def _measured(a: Any, b: Any, id: Any, ood: Any, *, reference: Any = None, **settings: Any) -> list[Any]:
    """The sides that are models as Results with per-image outputs; the others as they are."""
    sides = [side if _kept(side) else _opened(side, reference) for side in (a, b)]
    floats = (side for side in sides if getattr(side, "method", None) == "fp32")
    reference = next(floats, None) if reference is None else reference
    sides = [_opened(side, reference) if isinstance(side, str | Path) and not _kept(side) else side for side in sides]
    return [
        side if _kept(side) else evaluate(side, id, ood, reference=False, keep="scores", **settings) for side in sides
    ]


def _opened(side: Any, reference: Any) -> Any:
    """A model, ready to be measured; the file of one that needs its float model first, as it is."""
    needs = isinstance(side, str | Path) and Path(side).suffix in FOREIGN
    return side if needs and reference is None else measurable(side, reference=reference)


def _kept(side: Any) -> bool:
    """Whether it was measured already: a Result, a store, or a file of one."""
    if isinstance(side, Result):
        return True
    if not isinstance(side, str | Path):
        return False
    path = Path(split_selection(str(side))[0])
    return path.is_dir() or path.name == "store.sqlite" or path.suffix == ".json" or _is_outputs(path)


def _is_outputs(path: Path) -> bool:
    return path.suffix == ".npz" and not is_logits(path)


# ---- sides -----------------------------------------------------------------------------------------------------------


@checked
def open_side(given: str | Path | Result) -> Side:
    """`DIR`, `DIR:key=value,…` (keys model, method, bits, seed; a key given twice takes either), `RESULT.json` of
    `quantlens evaluate --json`, `OUTPUTS.npz` of `quantlens evaluate --keep`, a file of logits (.npz, .csv), or a
    Result (with intervals where it was measured with `keep`).

    Raises QuantlensError for what is none of these, holds no finished cell, or selects none.
    """
    if isinstance(given, Result):
        result = given.to_dict()
        return Side(given.title, [Entry(*_traits(result), result, None, given.outputs)])
    if not isinstance(given, str | Path):
        raise QuantlensError(
            f"a {type(given).__name__} is no result; give what ql.evaluate returns, or a file or study"
        )
    text = str(given)
    place, chosen = split_selection(text)
    path = Path(place)
    if is_logits(path):
        return open_side(evaluate(path, keep="scores"))._replace(name=text)
    if path.suffix in (".onnx", ".xml", ".safetensors"):
        raise QuantlensError(f"{text} is a model: give the images to compare it on (id=, --id)")
    if path.suffix == ".npz":
        return Side(text, [Entry(*_traits(kept.read(path).about), None, path)])
    if path.is_file() and path.name != "store.sqlite":
        result = _read_result(path)
        return Side(text, [Entry(*_traits(result), result, None)])
    return Side(text, _of_store(path.parent if path.name == "store.sqlite" else path, chosen))


def _traits(about: Mapping[str, Any]) -> tuple[str, str, str, int]:
    return str(about["model"]), str(about["method"]), str(about["bits"] or "unknown"), int(about["seed"])


def split_selection(text: str) -> tuple[str, dict[str, list[str]]]:
    """`DIR:key=value,…` as (DIR, {key: values}); a text without a selection as it is."""
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


def _of_store(directory: Path, chosen: Mapping[str, list[str]]) -> list[Entry]:
    """The finished cells that are chosen, with the outputs that are kept beside the store."""
    found = []
    with Store(directory) as store:
        for cell in store.cells():
            if cell.done:
                file = kept.path_of(directory, cell.key)
                found.append(Entry(*_traits(cell.spec), cell.result, file if file.is_file() else None))
    if not found:
        raise QuantlensError(f"the study in {directory} has no finished cell yet; run `quantlens study` first")
    selected = found
    for key, values in chosen.items():
        known = {str(getattr(entry, key)).lower(): str(getattr(entry, key)) for entry in found}
        for value in values:
            if value.lower() not in known:
                raise UnknownNameError(f"{key} in {directory}", value, known.values())
        wanted = [value.lower() for value in values]
        selected = [entry for entry in selected if str(getattr(entry, key)).lower() in wanted]
    if not selected:
        raise QuantlensError(
            f"no cell of {directory} is all of {', '.join(f'{k}={v}' for k, vs in chosen.items() for v in vs)}; "
            "leave a key out"
        )
    return selected


def _read_result(path: Path) -> dict[str, Any]:
    try:
        return Result.from_dict(json.loads(path.read_text(encoding="utf-8"))).to_dict()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{path} is no result of quantlens ({error}); give the directory of a study, a file of `quantlens evaluate "
            "--json`, or one of --keep"
        ) from error


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
        values = {t: [{getattr(entry, t) for entry in side} for side in (first, second)] for t in TRAITS}
        shared = [t for t, (one, two) in values.items() if one == two or len(one) != 1 or len(two) != 1]
        free = list(second)
        for entry in first:
            partners = [other for other in second if all(getattr(entry, t) == getattr(other, t) for t in shared)]
            left += [] if partners else [f"{entry} (A)"]
            for other in partners:
                free = [one for one in free if one is not other]
                title = _title(entry, other)
                matches.setdefault(tuple(title.values()), Match(title)).pairs.append((entry, other))
        left += [f"{entry} (B)" for entry in free]
    if not matches:
        raise QuantlensError(
            f"no cell of {a.name} answers to one of {b.name}: cells pair by model, method, bits and seed, but for what "
            "each side has one value of only; select with DIR:method=…,bits=…,model=…,seed=…"
        )
    return list(matches.values()), left


def _families(a: Side, b: Side) -> Iterable[tuple[list[Entry], list[Entry]]]:
    """The lists that are matched with each other."""
    first, second = a.entries, b.entries
    flipped = all(e.baseline for e in second)
    if all(e.baseline for e in first) == flipped:
        for baseline in (True, False):
            yield [e for e in first if e.baseline == baseline], [e for e in second if e.baseline == baseline]
        return
    base, others = (second, first) if flipped else (first, second)
    others = [e for e in others if not e.baseline]
    alone = len(base) == 1 and len({e.model for e in others}) == 1
    for entry in others:
        stand_in = [e for e in base if alone or e.model == entry.model][-1:]
        yield ([entry], stand_in) if flipped else (stand_in, [entry])


def _title(first: Entry, second: Entry) -> dict[str, str]:
    """Model, method and bits, each as one name, or as `A → B` where they differ."""
    pairs = {trait: (str(getattr(first, trait)), str(getattr(second, trait))) for trait in TRAITS[:3]}
    return {trait: one if one == two else f"{one} → {two}" for trait, (one, two) in pairs.items()}
