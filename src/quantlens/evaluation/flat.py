"""A result as one flat row, for spreadsheets and data frames: every number under its path."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantlens.errors import UnsupportedError
from quantlens.evaluation.result import COMPUTED, metrics_only
from quantlens.metrics import change

FIRST = ("model", "method", "bits", "seed", "options")
LEFT_OUT = frozenset({"per_class", "reliability", "histograms", "attention_examples", "thumbnails", "edges"})
"""Parts of a result that are no single numbers."""
NOT_MEASURED = frozenset({"fp32", "environment", "preprocess", "options", "allocation"})
"""Parts that are of something else, or settings."""


def numbers(result: Mapping[str, Any]) -> Iterator[tuple[str, float | int]]:
    """(path, number) of everything measured in a result: ("id.top1", 0.98), ("ood.textures.msp.aupr_out", …). Fractions
    as in `to_dict()`. "change.…" is computed from the result and the FP32 metrics it carries, never read."""
    kept = {key: value for key, value in result.items() if key not in COMPUTED}
    yield from _numbers({**kept, "change": change(metrics_only(result), result.get("fp32") or {})}, "")


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float | int]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key not in LEFT_OUT and key not in NOT_MEASURED:
                yield from _numbers(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def row(names: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """What a result is of (FIRST, from `names`; the options as JSON), then its numbers."""
    first = {key: names.get(key) for key in FIRST[:-1]}
    first["options"] = json.dumps(names.get("options") or {}, sort_keys=True)
    return first | {path: value for path, value in numbers(result) if path not in first}


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of rows: what they are of, then their numbers, sorted within each row."""
    return list(dict.fromkeys(key for one in rows for key in (*FIRST, *sorted(set(one) - set(FIRST)))))


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A pandas DataFrame of rows. Raises UnsupportedError where pandas is not installed."""
    try:
        import pandas
    except ImportError as error:
        raise UnsupportedError(
            "a DataFrame needs pandas: run `pip install 'quantlens[pandas]'`, or take to_dict() instead"
        ) from error
    return pandas.DataFrame(list(rows), columns=columns(rows))
