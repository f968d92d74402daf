"""Seconds that a person waits for."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.quality.case import Case


def _help(seed: int) -> float:
    """Processor-independent only in kind: ``quantlens --help`` in a fresh interpreter, the interpreter's own start left
    out."""
    code = (
        "import time; start = time.perf_counter()\n"
        "from quantlens.cli import main\n"
        "assert main.run(['--help']) == 0\n"
        "import sys; print(time.perf_counter() - start, file=sys.stderr)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stderr.split()[-1])


CASES = (Case("cli/help", "seconds of quantlens --help", _help, below=1),)
