"""Numbers, precisions and names as the report prints them. Pure functions, no knowledge of the store."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from quantlens.metrics import METRICS, Spread as Stat, available_scores, number as number, score_label as score_label

MISSING = "–"
MINUS = "−"
BASELINE = "FP32"


def fixed(value: float | None, digits: int, *, sign: bool = False) -> str:
    """`value` with `digits` decimals, a true minus sign, and no "-0.0"; the missing mark for None."""
    if value is None:
        return MISSING
    text = f"{value:{'+' if sign else ''}z.{digits}f}"
    return text.lstrip("+") if not text.strip("+0.") else text.replace("-", MINUS)


def percent(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A fraction as a percentage without the percent sign."""
    return fixed(None if value is None else 100 * value, digits, sign=sign)


def mean_std(stat: Stat | None, digits: int, *, sign: bool = False) -> str:
    """ "62.0 ± 0.4"; only the mean where there is one seed."""
    if stat is None:
        return MISSING
    text = fixed(stat.mean, digits, sign=sign)
    return text if stat.std is None else f"{text} ± {fixed(stat.std, digits)}"


def parse_bits(bits: str) -> tuple[int, int] | None:
    """(weight bits, activation bits) of "W4A8"; None for FP32 and for mixed precision."""
    match = re.fullmatch(r"W(\d+)A(\d+)", bits)
    return (int(match[1]), int(match[2])) if match else None


def precision_order(bits: str) -> tuple[int | str, ...]:
    """Sort key: FP32, then falling bit widths (the paper's W8A8, W6A6, W4A8, W8A4, W4A4), then names without
    widths."""
    widths = parse_bits(bits)
    if widths is None:
        return (0,) if bits == BASELINE else (2, bits)
    w, a = widths
    return (1, -(w + a), abs(w - a), w)


def score_order(score: str) -> tuple[int, str]:
    known = list(available_scores(own=True))
    return (known.index(score), "") if score in known else (len(known), score)


def metric_heading(name: str) -> str:
    """A metric as a column's title, with its unit and the better direction: "Top-1 % ↑"."""
    return _capital(METRICS[name].heading)


def metric_title(name: str) -> str:
    """A metric's name in running text and as a chart's title: "Top-1"."""
    return _capital(METRICS[name].title)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:] if text[1:2].islower() else text  # not mAP, not k-NN


def metric_digits(name: str) -> int:
    """Decimals of a metric in the report: percentages have one."""
    return 1 if METRICS[name].percent else METRICS[name].digits


def join_words(words: Sequence[str], *, limit: int = 8) -> str:
    """ "a", "a and b", "a, b and c"; beyond `limit` the rest is counted."""
    shown = [*words[: limit - 1], f"{len(words) - limit + 1} more"] if len(words) > limit else list(words)
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))


def span(values: Iterable[int]) -> str:
    """ "3" where all are the same, else "1 to 3"; the missing mark without any."""
    found = sorted(values)
    return " to ".join(map(str, dict.fromkeys((found[0], found[-1])))) if found else MISSING


def count(n: int, noun: str, plural: str = "") -> str:
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """ "4.2 s", "42 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def plain(value: Any) -> str:
    """A stored value as one line of text: text as it is, anything else as JSON."""
    if value is None:
        return MISSING
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
