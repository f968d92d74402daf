"""Measure and compare: ``python -m benchmarks.quality [NAME …]``.

A NAME is a case, or what its name begins with (``fast``, ``gap/repq``); all of them by default.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from benchmarks.quality import calibrated, devices, networks, own, parts, timing, trained
from benchmarks.quality.case import Case, NotHere

CASES: tuple[Case, ...] = (
    *own.CASES,
    *calibrated.CASES,
    *trained.CASES,
    *parts.CASES,
    *networks.CASES,
    *devices.CASES,
    *timing.CASES,
)


def chosen(names: list[str]) -> list[Case]:
    """The cases of which some name is the beginning. Raises SystemExit for a name of none."""
    for name in names:
        if not any(case.name.startswith(name) for case in CASES):
            groups = sorted({case.name.split("/")[0] for case in CASES})
            raise SystemExit(f"no case begins with {name!r}; there are: {', '.join(groups)}")
    return [case for case in CASES if not names or any(case.name.startswith(name) for name in names)]


def line(case: Case) -> tuple[str, bool]:
    """One line for a case, and whether it is kept (or cannot be measured here)."""
    started = time.perf_counter()
    try:
        measured = case.measure()
    except NotHere as reason:
        return f"{case.name:34} {'—':>10}   wanted {case.wanted:10} skipped: {reason}", True
    kept = case.kept(measured)
    spread = f"{min(measured):.4g} … {max(measured):.4g}"
    seconds = time.perf_counter() - started
    return (
        f"{case.name:34} {statistics.median(measured):10.4g}   wanted {case.wanted:10} {'ok  ' if kept else 'MISS'} "
        f"({spread}; {seconds:.0f} s)  {case.what}",
        kept,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a case, or what its name begins with")
    parser.add_argument("--list", action="store_true", help="say what there is, and measure nothing")
    arguments = parser.parse_args()
    missed = 0
    for case in chosen(arguments.names):
        if arguments.list:
            print(f"{case.name:34} {case.wanted:10} {case.what}")
            continue
        said, kept = line(case)
        print(said, flush=True)
        missed += not kept
    if missed:
        print(f"{missed} missed", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
