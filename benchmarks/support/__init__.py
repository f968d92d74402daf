"""``python -m benchmarks support``: what works with which architecture, and docs/supported-models.md.

Every architecture is built small, its tensors are redrawn at trained scale, and it goes through capture, six
quantizations, reload and export in a process of its own (:mod:`benchmarks.support.worker`). One results file each, so
that a run goes on where it was stopped.
"""

import argparse
import datetime
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.support.architectures import architectures
from benchmarks.support.worker import SAME
from quantlens import __version__

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "supported-models.md"
LIMIT = 600
"""Seconds that an architecture may take."""

MARGIN = 3.0
"""dB by which W8A8 of the default may lie below min-max, and a file below what two simulations differ by."""

ENOUGH = 30.0
"""dB of an exported model to the simulation."""

DEFAULT = "quantlens-fast"
STEPS = ("capture", "W8A8", "W4A4", "reload", "ONNX", "OpenVINO")
FULL, HALF, NONE = "●", "◐", "○"
GROUPS = {
    "timm": ("timm",),
    "Hugging Face transformers": ("transformers",),
    "Detectors": ("shipped", "detectors"),
}
"""Titles of the page's tables -> where their models come from."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks support", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="names (patterns) of architectures")
    parser.add_argument("--out", type=Path, default=Path("support"), help="folder of the results files")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--again", action="store_true", help="also those that have a results file")
    parser.add_argument("--quick", action="store_true", help="capture and W8A8 of the default and min-max alone")
    parser.add_argument("--page", type=Path, help=f"write the page of all results ({PAGE.relative_to(ROOT)})")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    entries = architectures()
    names = [n for n in entries if not chosen.only or any(fnmatch(n, pattern) for pattern in chosen.only)]
    waiting = [n for n in names if chosen.again or not (chosen.out / f"{n}.json").is_file()]
    os.environ["OMP_NUM_THREADS"] = "1"
    for number, name in enumerate(_run(waiting, entries, chosen), 1):
        marks = judge(json.loads((chosen.out / f"{name}.json").read_text(encoding="utf-8")))
        shown = "".join(marks[step][0] for step in STEPS)
        reasons = "; ".join(f"{step}: {reason}" for step, (_, reason) in marks.items() if reason)
        print(f"{number}/{len(waiting)} {shown} {name} {reasons[:300]}", flush=True)
    if chosen.page:
        old = chosen.page.read_text(encoding="utf-8") if chosen.page.is_file() else ""
        chosen.page.write_text(page(chosen.out, list(entries), old), encoding="utf-8")
        print(f"wrote {chosen.page}")


def _run(waiting: list[str], entries: dict[str, Any], chosen: Any) -> Iterator[str]:
    """Run architectures, some at a time, each in a child of this process, which has read the libraries once; yields
    names as they end. One that takes too long is stopped, and what it has done is kept."""
    if waiting:
        import timm  # noqa: F401
        import transformers  # noqa: F401

        import quantlens  # noqa: F401
    context, running, todo = multiprocessing.get_context("fork"), {}, list(waiting)
    while todo or running:
        while todo and len(running) < chosen.jobs:
            name = todo.pop(0)
            path = chosen.out / f"{name}.json"
            path.unlink(missing_ok=True)
            child = context.Process(target=_child, args=(name, entries[name], path, chosen.quick))
            child.start()
            running[name] = (child, time.monotonic(), path)
        for name, (child, started, path) in list(running.items()):
            late = time.monotonic() - started > LIMIT
            if child.is_alive() and not late:
                continue
            if late and child.is_alive():
                child.kill()
            child.join()
            del running[name]
            data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"name": name, "steps": {}}
            if child.exitcode:
                data["ended"] = f"stopped after {LIMIT} s" if late else f"the process ended with {child.exitcode}"
            path.write_text(json.dumps(data, indent=1), encoding="utf-8")
            yield name
        time.sleep(0.2)


def _child(name: str, entry: dict[str, Any], path: Path, quick: bool) -> None:
    import warnings

    import torch

    from benchmarks.support.worker import run

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    run(name, entry, path, quick=quick)


# ---- marks -----------------------------------------------------------------------------------------------------------


def judge(data: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """(mark, reason) of each step: ● as it should be, ◐ in part, ○ not."""
    steps, ended = data["steps"], data.get("ended", "")
    groups = {
        "capture": ["capture"],
        "W8A8": [name for name in steps if name.endswith("W8A8") and " " in name and name.count(" ") == 1],
        "W4A4": [name for name in steps if name.endswith("W4A4") and name.count(" ") == 1],
        "reload": [name for name in steps if name.startswith("reload")],
        "ONNX": [name for name in steps if name.endswith(".onnx")],
        "OpenVINO": [name for name in steps if name.endswith(".xml")],
    }
    marks: dict[str, tuple[str, str]] = {}
    for step in STEPS:
        done = [(name, steps[name]) for name in groups[step] if name in steps]
        bad = [(name, one) for name, one in done if not one.get("ok")]
        reasons = [re.sub(r"/\S*/", "", one["error"]) if "error" in one else _numbers(one) for _, one in bad]
        reasons += _why_apart([one for _, one in bad])
        if step == "W8A8" and (below := _below(steps)):
            reasons.append(below)
        if not done:
            marks[step] = (NONE, ended)
        else:
            mark = NONE if len(bad) == len(done) else HALF if reasons else FULL
            marks[step] = (mark, "; ".join(dict.fromkeys(reasons)))
    return marks


def _numbers(one: dict[str, Any]) -> str:
    if "apart" in one:
        return f"{one['apart']:.1e} of the output's scale apart"
    if "db" in one:
        return f"{one['db']:.1f} dB"
    return "not bit-equal"


def _why_apart(exports: list[dict[str, Any]]) -> list[str]:
    """Why files lie apart from their simulation: a fault at a quantizer, or values at the borders of two codes, which
    part two simulations as much, to `MARGIN`; more than that is said."""
    faults = [f"a fault at {one['edge']}, by itself {one['weakest']:.1f} dB" for one in exports if _faulty(one)]
    moved = [one for one in exports if "rounding" in one and not _faulty(one)]
    if moved:
        floor, least = (min(one.get(key, math.inf) for one in moved) for key in ("rounding", "weakest"))
        alone = f"; every quantizer of the file by itself: {least:.0f} dB or more" if least < math.inf else ""
        gap = max(one["rounding"] - one.get("db", math.inf) for one in moved)
        if gap <= MARGIN:
            faults.append(f"within the rounding of codes: two simulations differ as much ({floor:.1f} dB{alone})")
        else:
            faults.append(
                f"{gap:.1f} dB beyond the rounding of codes: two simulations differ less ({floor:.1f} dB{alone})"
            )
    return faults


def _faulty(one: dict[str, Any]) -> bool:
    return bool(one.get("weakest", math.inf) < SAME)


def _below(steps: dict[str, Any]) -> str:
    """Where W8A8 by the default lies below min-max, in words; "" where it does not."""
    ours, other = (steps.get(f"{method} W8A8", {}) for method in (DEFAULT, "minmax"))
    if "db" not in ours or "db" not in other:
        return ""
    pairs = {"the output": (ours["db"], other["db"])}
    pairs |= {name: (db, other["blocks"].get(name, db)) for name, db in ours["blocks"].items()}
    worst = max(pairs, key=lambda name: pairs[name][1] - pairs[name][0])
    mine, theirs = pairs[worst]
    return f"{theirs - mine:.1f} dB below minmax ({mine:.1f}) at {worst}" if theirs - mine > MARGIN else ""


# ---- the page --------------------------------------------------------------------------------------------------------


def page(folder: Path, names: list[str], old: str = "") -> str:
    """The page: how often each step is as it should be, and a table by library with reasons below it. old: a page whose
    rows are kept for architectures without results in the folder."""
    from importlib.metadata import PackageNotFoundError, version

    versions = []
    for package in ("torch", "timm", "transformers", "onnxruntime", "openvino"):
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    entries, rows = architectures(), _rows(old)
    for name in names:
        if (folder / f"{name}.json").is_file():
            marks = judge(json.loads((folder / f"{name}.json").read_text("utf-8")))
            reasons = "; ".join(f"{step}: {reason}" for step, (_, reason) in marks.items() if reason)
            rows[_said(name, entries[name])] = ([marks[step][0] for step in STEPS], _plain(reasons))
    rows = {said: rows[said] for said in (_said(name, entries[name]) for name in names) if said in rows}
    count = [sum(marks[place] == FULL for marks, _ in rows.values()) for place in range(len(STEPS))]
    lines = [
        "# Supported models",
        "",
        f"Generated by `python -m benchmarks support --page docs/supported-models.md` on {datetime.date.today()}: "
        f"quantlens {__version__}, {', '.join(versions)}. Results are kept for each architecture, so that a run goes "
        "on where it was stopped: not all come from one run or one state of the code (`--again` makes them anew).",
        "",
        f"{len(rows)} architectures, built small. Every parameter, and every buffer that training fills, is redrawn "
        "at trained scale (weights of a fresh model hide faults), and the images are photographs.",
        "",
        f"{FULL} as it should be, {HALF} in part, {NONE} not. *Capture*: within 10⁻⁴ of the module, relative to the "
        f"output's scale. *W8A8*: `{DEFAULT}`, `minmax` and `repq-vit` run, and `{DEFAULT}`, the default, is at most "
        f"{MARGIN:.0f} dB below `minmax`, at the output and after every block. *W4A4*: the three run. *Reload*: "
        "bit-equal. *ONNX*, *OpenVINO*: the files of the default's W8A8, with the target `openvino-cpu` and without, "
        f"give at least {ENOUGH:.0f} dB to the simulation (a detector's class logits), and every quantizer at least "
        f"{SAME:.0f} dB where the "
        "simulation is given the file's own values before it. Some networks make so much of a value that takes the "
        "other of two codes that two simulations, whose quantizers read values 3·10⁻⁷ apart, differ by more than the "
        "30 dB: what is below that but without a fault of its own says so.",
        "",
        "| | " + " | ".join(STEPS) + " |",
        "| --- |" + " --- |" * len(STEPS),
        f"| {FULL} | " + " | ".join(f"{n} ({100 * n / max(len(rows), 1):.0f} %)" for n in count) + " |",
    ]
    for title, sources in GROUPS.items():
        those = [_said(name, entry) for name, entry in entries.items() if entry["source"] in sources]
        those = [said for said in those if said in rows]
        if not those:
            continue
        lines += ["", f"## {title}", "", "| model | " + " | ".join(STEPS) + " |", "| --- |" + " --- |" * len(STEPS)]
        lines += [f"| {said} | {' | '.join(rows[said][0])} |" for said in those]
        why = [f"- **{said}**: {rows[said][1]}" for said in those if rows[said][1]]
        lines += ["", f"What is not {FULL}:", "", *why] if why else []
    return "\n".join(lines) + "\n"


def _said(name: str, entry: dict[str, Any]) -> str:
    return f"{entry['model']} ({name})" if "model" in entry else name


def _rows(text: str) -> dict[str, tuple[list[str], str]]:
    """What a page says of each architecture: its marks and reasons."""
    why = dict(re.findall(r"^- \*\*(.+?)\*\*: (.*)$", text, re.MULTILINE))
    marks = "|".join((FULL, HALF, NONE))
    found = re.findall(rf"^\| (.+?)((?: \| (?:{marks})){{{len(STEPS)}}}) \|$", text, re.MULTILINE)
    return {said: (cells.split(" | ")[1:], why.get(said, "")) for said, cells in found}


def _plain(text: str) -> str:
    """A reason as a cell of a table."""
    return text.replace("|", "/").replace("<", "‹").replace(">", "›").replace("\n", " ")[:300]
