"""The rows of a set in docs/results.json, from the store of a study: means and standard deviations over seeds.

    python -m benchmarks.results DIR --set validation

DIR is the --out of `quantlens study`, which may still be running: there is a row for what is finished, whichever part
of the study ran last. Rows of the set that DIR has nothing of stay, so that a study can go on in another folder.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from quantlens.methods import registry
from quantlens.metrics import Spread
from quantlens.studies.board import collect
from quantlens.studies.robustness import RATIO, has_shift, robustness
from quantlens.studies.store import Store

FILE = Path(__file__).resolve().parents[1] / "docs" / "results.json"
NAMES = {"deit_tiny_patch16_224": "DeiT-Tiny", "vit_tiny_patch16_224": "ViT-Tiny"}
"""Architecture -> what the tables call it."""
SCORE = "msp"


def own_options(spec: dict[str, Any]) -> dict[str, Any]:
    """What a cell's method was given beside its defaults."""
    info = registry.get(spec["method_name"]).info
    usual = {name: option.default for name, option in info.options.items()}
    usual["outlier_channels"] = info.arguments.get("outlier_channels", "keep")
    return {name: value for name, value in spec["options"].items() if name in usual and value != usual[name]}


def number(values: list[float], digits: int) -> Any:
    """A number, or [mean, standard deviation] of several."""
    spread = Spread.of(values)
    assert spread is not None
    rounded = [round(spread.mean, digits), round(spread.std or 0.0, digits)]
    return rounded if len(values) > 1 else rounded[0]


def shift_of(directory: Path, cells: list[Any]) -> dict[str, dict[str, Any]]:
    """Of every cell by its key: what was measured under corruption, with 95 % intervals where outputs are kept."""
    board = collect(cells, None)
    board.directory = directory
    found: dict[str, dict[str, Any]] = {}
    for (index, bits), one in (robustness(board) if has_shift(board) else {}).items():
        paths = {
            "mce": one.values.get("shift_mean.corruptions.top1"),
            "relative_mce": one.changes.get(RATIO),
            "nll_corrupted": one.values.get("shift_mean.corruptions.nll"),
            "ece_corrupted": one.values.get("shift_mean.corruptions.ece"),
            "auroc": one.values.get(f"ood_mean.far.{SCORE}.auroc"),
            "auroc_full": one.values.get(f"full_spectrum_mean.far.{SCORE}.auroc"),
        }
        row = {name: _with_ends(name, measured) for name, measured in paths.items() if measured is not None}
        severities = [one.values.get(f"shift_mean.severity_{n}.top1") for n in range(1, 6)]
        row["severities"] = [round(100 * of.value, 1) for of in severities if of is not None]
        found |= {str(result["cell_key"]): row for result in board.groups[index].results(bits)}
    return found


def _with_ends(name: str, measured: Any) -> list[float]:
    """[value, low, high], or [value]; percent but for ratios and NLL. The mean corruption error is 1 − top-1. ECE goes
    without: the calibration error of a resample is larger than that of the images."""
    values = [value for value in measured if value is not None][: 1 if name == "ece_corrupted" else 3]
    if name == "mce":
        values = [1 - value for value in (values[0], *reversed(values[1:]))]
    plain = name in ("relative_mce", "nll_corrupted")
    return [round(value, 3) if plain else round(100 * value, 1) for value in values]


def rows(directory: Path, key: str) -> list[dict[str, Any]]:
    """A row for each model, method and precision of the store."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    with Store(directory) as store:
        done = [cell for cell in store.cells(everything=True) if cell.result is not None]
    corrupted = shift_of(directory, done)
    for cell in done:
        groups.setdefault((cell.spec["model"], cell.spec["method"], cell.spec["bits"]), []).append(cell)
    found = []
    for cells in groups.values():
        spec, results = cells[0].spec, [cell.result for cell in cells]
        plain = spec["bits"] == "FP32"
        row = {
            "set": key,
            "model": NAMES.get(spec["architecture"].partition(".")[0], spec["model"]),
            "method": None if plain else spec["method_name"],
            "options": {} if plain else own_options(spec),
            "bits": spec["bits"],
            "seeds": len(cells),
            "date": max(cell.created for cell in cells)[:10],
            "top1": number([100 * one["id"]["top1"] for one in results], 1),
            "nll": number([one["id"]["nll"] for one in results], 2),
            "size_mb": round(results[0]["size_mb"], 1),
        }
        sets = {name: [100 * one["ood"][name][SCORE]["aupr_out"] for one in results] for name in results[0]["ood"]}
        under = corrupted.get(cells[0].key, {})
        row |= under
        if sets and not under:
            row["aupr_out"] = {name: number(v, 1) for name, v in sets.items()}
        found.append(row)
    return found


def merged(new: list[dict[str, Any]], old: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new rows and those old ones that no new one stands for (another setting, or more seeds), FP32 first."""
    seeds = {_row(row): row["seeds"] for row in old}
    found = {_row(row): row for row in old} | {_row(row): row for row in new if row["seeds"] >= seeds.get(_row(row), 0)}
    order = list(dict.fromkeys(_setting(row) for row in found.values()))
    return sorted(
        found.values(),
        key=lambda row: (row["model"], row["method"] is not None, order.index(_setting(row)), _widths(row)),
    )


def _row(row: dict[str, Any]) -> tuple[str, str, str]:
    """What there is one row for."""
    return row["model"], _setting(row), row["bits"]


def _setting(row: dict[str, Any]) -> str:
    return f"{row['method']} {row['options']}"


def _widths(row: dict[str, Any]) -> list[int]:
    """Precisions from wide to narrow."""
    return [-int(width) for width in re.findall(r"\d+", row["bits"])]


def written(data: dict[str, Any]) -> str:
    """The file's text, a line for each set and row."""

    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    sets = ",\n".join(f"  {line(name)}: {line(about)}" for name, about in data["sets"].items())
    lists = [
        f' "{key}": [\n' + ",\n".join(f"  {line(row)}" for row in data[key]) + "\n ]" for key in data if key != "sets"
    ]
    return f'{{\n "sets": {{\n{sets}\n }},\n' + ",\n".join(lists) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    parser.add_argument("directory", type=Path, help="the --out of the study")
    parser.add_argument("--set", required=True, help="the set of docs/results.json")
    arguments = parser.parse_args()
    data = json.loads(FILE.read_text(encoding="utf-8"))
    if arguments.set not in data["sets"]:
        parser.error(f"docs/results.json has no set {arguments.set!r}; describe it there first, under `sets`")
    new, own = rows(arguments.directory, arguments.set), [row for row in data["rows"] if row["set"] == arguments.set]
    first = data["rows"].index(own[0]) if own else 0
    others = [row for row in data["rows"] if row["set"] != arguments.set]
    data["rows"] = [*others[:first], *merged(new, own), *others[first:]]
    FILE.write_text(written(data), encoding="utf-8")
    print(f"{len(new)} rows of {arguments.set}")


if __name__ == "__main__":
    main()
