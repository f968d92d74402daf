"""The tests under the instruction sets of other processors, with one and two threads.

One run of pytest for every setting, a table of outcomes, and one log per setting in the folder of ``--out``. A setting
whose log says that it finished is not run again (``--again`` runs it). Ends with 1 if any setting is red.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SELECTION = "not slow and not process and not browser"
LOWER = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""oneDNN and MKL choose their instructions apart from ATen."""

CAPABILITIES: dict[str, dict[str, str]] = {
    "default": {"ATEN_CPU_CAPABILITY": "default", **LOWER},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", **LOWER},
    "own": {},
}
VARIABLES = ("ATEN_CPU_CAPABILITY", *LOWER)
FINISHED = "# finished with "


@dataclass(frozen=True)
class Setting:
    """An instruction set (a key of :data:`CAPABILITIES`) and torch's threads."""

    capability: str
    threads: int

    @property
    def name(self) -> str:
        return f"{self.capability}-{self.threads}"

    def environment(self) -> dict[str, str]:
        """This process's, with what the setting says in place of what was set before."""
        kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        threads = {"QUANTLENS_TEST_THREADS": str(self.threads), "OMP_NUM_THREADS": str(self.threads)}
        return {**kept, **CAPABILITIES[self.capability], **threads}


@dataclass(frozen=True)
class Outcome:
    """How many tests ended how, pytest's exit status, and seconds; a count is missing where pytest gave none."""

    counts: dict[str, int]
    status: int
    seconds: float

    @property
    def green(self) -> bool:
        return self.status == 0

    def line(self, name: str) -> str:
        shown = "  ".join(f"{self.counts.get(kind, 0):6d}" for kind in ("passed", "failed", "error", "skipped"))
        return f"{name:12} {shown}  {self.seconds:8.0f}  {'green' if self.green else 'RED'}"


def read(log: Path) -> Outcome | None:
    """The outcome that a finished log tells, or None."""
    if not log.is_file():
        return None
    text = log.read_text(encoding="utf-8", errors="replace")
    ended = re.search(rf"^{FINISHED}(-?\d+) after ([\d.]+) s$", text, re.M)
    if ended is None:
        return None
    summary = next((line for line in reversed(text.splitlines()) if re.search(r" in [\d.]+s", line)), "")
    counts = {kind.rstrip("s"): int(n) for n, kind in re.findall(r"(\d+) (passed|failed|errors?|skipped)", summary)}
    return Outcome(counts, int(ended[1]), float(ended[2]))


def run(setting: Setting, log: Path, arguments: list[str], jobs: int) -> Outcome:
    """Run pytest under a setting, its output in the log."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--show-capture=no", "-n", str(jobs), *arguments]
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        print(f"# {setting.name}: {' '.join(command)}", file=file, flush=True)
        status = subprocess.run(
            command, env=setting.environment(), stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
        print(f"{FINISHED}{status} after {time.monotonic() - started:.1f} s", file=file)
    found = read(log)
    assert found is not None
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processors", description=__doc__)
    parser.add_argument("paths", nargs="*", help="tests to run (all of make test's selection by default)")
    parser.add_argument("--out", type=Path, default=Path("processors"), help="folder of the logs")
    parser.add_argument("--again", action="store_true", help="run finished settings again")
    parser.add_argument("--only", nargs="*", metavar="SETTING", help="such as avx2-1 (all by default)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; half as many with two threads")
    parser.add_argument("-m", dest="marker", default=SELECTION, help="pytest's selection by marker")
    given = parser.parse_args()
    settings = [Setting(capability, threads) for threads in (1, 2) for capability in CAPABILITIES]
    unknown = set(given.only or ()) - {setting.name for setting in settings}
    if unknown:
        parser.error(f"no such setting: {', '.join(sorted(unknown))}")
    given.out.mkdir(parents=True, exist_ok=True)
    print(f"{'setting':12} passed  failed   error  skipped   seconds", flush=True)
    red = 0
    for setting in settings:
        if given.only and setting.name not in given.only:
            continue
        log = given.out / f"{setting.name}.log"
        outcome = None if given.again else read(log)
        if outcome is None:
            outcome = run(setting, log, ["-m", given.marker, *given.paths], max(1, given.jobs // setting.threads))
        print(outcome.line(setting.name), flush=True)
        red += not outcome.green
    return 1 if red else 0


if __name__ == "__main__":
    raise SystemExit(main())
