"""Benchmarks that are lists of cells on the two public models: a line of JSON for each cell as it is measured, in a
file that a stopped run goes on with; and their numbers in docs/results.json.

Needs the folder of weights and images that the project's tests use ($QUANTLENS_DATA).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.results import FILE, written

SHARED = Path(os.environ.get("QUANTLENS_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
MODELS = {"DeiT-Tiny": "deit_tiny_patch16_224", "ViT-Tiny": "vit_tiny_patch16_224.augreg_in21k_ft_in1k"}
KNOWN = f"imagenet:{SHARED}/imagenet_val[1::2]"
"""300 official validation images, those kept for reporting."""

Row = dict[str, Any]


@cache
def model(label: str) -> Any:
    """A float model with its public weights."""
    import quantlens as ql

    return ql.load_model(MODELS[label], weights=str(SHARED / "weights" / f"{MODELS[label]}.safetensors"))


def measure(out: Path, cells: list[Row], numbers: Callable[[Row], Row]) -> None:
    """Every cell that ``out`` lacks, in order. numbers: cell -> what was measured of it."""
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    left = [cell for cell in cells if not any(cell.items() <= one.items() for one in done)]
    start = time.time()
    for number, cell in enumerate(left, 1):
        row = cell | numbers(cell)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        hours = (time.time() - start) / number * (len(left) - number) / 3600
        said = {key: value for key, value in row.items() if not isinstance(value, list)}
        print(f"{number}/{len(left)} {said} about {hours:.1f} h left", flush=True)


def publish(files: list[Path], key: str, row: Callable[[Row], Row], cell: tuple[str, ...]) -> list[Row]:
    """Put the measured cells into docs/results.json, under ``key``, beside those that are there of other cells; returns
    all. row: a cell as it stands there. cell: names of what tells one from another."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    new = [row(json.loads(line)) for file in files for line in file.open()]
    rows = {tuple(one[name] for name in cell): one for one in [*data.get(key, []), *new]}
    data[key] = list(rows.values())
    FILE.write_text(written(data), encoding="utf-8")
    return data[key]


def arguments(name: str, about: str | None, models: Sequence[str] = tuple(MODELS)) -> argparse.ArgumentParser:
    """--out, --model and --publish."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        action="append",
        help="the file of results, a line for each (to publish: several)",
    )
    parser.add_argument("--model", choices=models, action="append", help="this model alone (default: all)")
    parser.add_argument("--publish", action="store_true", help="write what there is into docs/")
    return parser
