"""Proof that a change of the code did not change what is computed:

    python -m benchmarks.equivalence BASE_COMMIT [--methods a,b] [--bits W8A8,W4A4] [--models vit,swin,conv]

Every method on three small graphs, with the code of BASE_COMMIT and with this checkout (uncommitted changes included),
each in a process of its own with one thread; all results are compared bit for bit. One line per case that differs, a
summary, exit status 1 if any differs. A case that both reject with the same type of error counts as equal. With HEAD as
BASE_COMMIT, a clean checkout runs the same code twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("equivalence_worker.py")
SHORT = {"iterations": 20, "mlp_iterations": 20, "scale_iterations": 16}
"""Options that keep training short, or make it happen, for every method that has them on both sides."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SIDES = ("base", "here")


@dataclass
class Case:
    """What both sides computed for one case, and what was found: differences, and notes that change no number."""

    name: str
    results: tuple[dict[str, Any], dict[str, Any]]
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        return not self.differences and "error" in self.results[0]


@contextlib.contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """A git worktree of a commit that is gone afterwards. Raises SystemExit for a commit that git does not know."""
    git = ["git", "-C", str(HERE)]
    made = subprocess.run([*git, "worktree", "add", "--detach", str(folder), commit], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"no worktree of {commit}: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(folder)], check=True, capture_output=True)


def work(verb: str, job: dict[str, Any]) -> None:
    """Run the worker on the code of ``job["source"]``. Raises SystemExit with its last words if it fails."""
    path = Path(job["folder"]) / f"job {job.get('model', verb)}.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    environment = {
        **os.environ,
        **dict.fromkeys(THREADS, "1"),
        "PYTHONPATH": job["source"],
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-P", "-W", "ignore", str(WORKER), verb, str(path)]
    ended = subprocess.run(command, env=environment, cwd=job["folder"], capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"the worker failed on {job['source']}:\n{ended.stderr[-3000:]}")


def load(stem: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(stem.with_name(f"{stem.name}.json").read_text(encoding="utf-8"))
    return found


def arrays(folder: Path, case: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{case}.npz") as stored:
        return {name.replace("|", "/"): stored[name] for name in stored.files}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(logits: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence, in nats, of the predictions of ``other`` [N, K] from those of ``logits`` [N, K]."""
    p, q = log_softmax(logits), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def sqnr(values: np.ndarray, other: np.ndarray) -> float:
    """Signal-to-noise ratio of ``other`` against ``values``, in dB."""
    signal_, noise = np.square(values.astype(np.float64)).sum(), np.square(values.astype(np.float64) - other).sum()
    return float("inf") if noise == 0 else float(10 * np.log10(signal_ / noise))


def compare(name: str, folders: tuple[Path, Path]) -> Case:
    """Compare one case. Tensors of the graph may change their names, not their values."""
    old, new = (load(folder / name) for folder in folders)
    case = Case(name, (old, new))
    if old.get("error") != new.get("error"):
        case.differences.append(f"{_outcome(old)} before, {_outcome(new)} now")
        return case
    if old.get("unread"):
        case.differences.append(f"neither side's result could be read: {_outcome(old)}")
    if old.get("message") != new.get("message"):
        case.notes.append(f"the message was: {old['message']!r}, and is: {new['message']!r}")
    for what in ("rewrites", "formats"):
        if old.get(what) != new.get(what):
            case.notes.append(f"text of {what} differs")
    for side, result in zip(SIDES, case.results, strict=True):
        if result.get("changed"):
            case.notes.append(f"the caller's model was changed ({side})")
    before, after = old["digests"], new["digests"]
    if before == after:
        return case
    graphs = [Counter(v for k, v in side.items() if k.startswith("graph ")) for side in (before, after)]
    if graphs[0] != graphs[1]:
        total = max(sum(counts.values()) for counts in graphs)
        case.differences.append(f"tensors of the graph: {sum((graphs[1] - graphs[0]).values())} of {total}")
    before, after = ({k: v for k, v in side.items() if not k.startswith("graph ")} for side in (before, after))
    if set(before) != set(after):
        names = sorted(set(before) ^ set(after))
        case.differences.append(f"{len(names)} tensors on one side alone, such as {names[0]!r}")
    both = [key for key in before if key in after]
    unequal = [key for key in both if before[key] != after[key]]
    if unequal:
        case.differences += _sizes(unequal, both, arrays(folders[0], name), arrays(folders[1], name))
    elif not case.differences:
        case.notes.append("names of the graph's tensors differ")
    return case


def _outcome(result: dict[str, Any]) -> str:
    return f"{result['error']} ({result['message']})" if "error" in result else "a result"


def _sizes(unequal: list[str], both: list[str], old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How large the differences are: of the logits with SQNR and KL, of the rest by kind."""
    found = []
    if "logits" in unequal:
        a, b = old["logits"], new["logits"]
        found.append(f"logits: max |Δ| {np.abs(a - b).max():.3g}, {sqnr(a, b):.1f} dB, KL {divergence(a, b):.3g}")
    for kind in ("parameter", "weight codes", "weight values", "activation codes", "activation values", "operator"):
        keys = [key for key in unequal if key.startswith(kind)]
        if not keys:
            continue
        largest = max(
            (float(np.abs(old[k].astype(np.float64) - new[k]).max()) for k in keys if old[k].shape == new[k].shape),
            default=float("nan"),
        )
        total = sum(key.startswith(kind) for key in both)
        found.append(f"{kind}: {len(keys)} of {total} (max |Δ| {largest:.3g}), first {keys[0][len(kind) + 1 :]}")
    return found


def from_float(case: Case, folders: tuple[Path, Path]) -> str:
    """KL and SQNR of both sides from the float model, as a line."""
    model, values = case.name.split()[0], []
    for folder in folders:
        logits = arrays(folder, case.name)["logits"]
        exact = arrays(folder, f"{model} float")["logits"]
        values.append((divergence(exact, logits), sqnr(exact, logits)))
    (kl, db), (kl_now, db_now) = values
    change = 100 * (kl_now / kl - 1) if kl else float("nan")
    return f"{case.name}: KL {kl:.5g} -> {kl_now:.5g} ({change:+.2f} %), {db:.2f} -> {db_now:.2f} dB"


def describe(sources: tuple[Path, Path], folders: tuple[Path, Path]) -> tuple[list[dict[str, list[str]]], list[str]]:
    """Methods and options of both sides, and a line for each method that one side lacks."""
    for source, folder in zip(sources, folders, strict=True):
        work("describe", {"source": str(source), "folder": str(folder)})
    known = [json.loads((folder / "methods.json").read_text(encoding="utf-8")) for folder in folders]
    missing = [f"{name}: no such method on one side" for name in sorted(set(known[0]) ^ set(known[1]))]
    return known, missing


def options_for(known: list[dict[str, list[str]]], methods: list[str]) -> dict[str, dict[str, Any]]:
    """The options of :data:`SHORT` that a method has on both sides; its defaults serve for the others."""
    return {method: {k: v for k, v in SHORT.items() if all(k in side[method] for side in known)} for method in methods}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("--methods", help="names, with commas between (default: all)")
    parser.add_argument("--bits", default="W8A8,W4A4")
    parser.add_argument("--models", default="vit,swin,conv")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once, each with one thread")
    parser.add_argument("--kl", action="store_true", help="KL and dB from the float model, before and now, per case")
    parser.add_argument("--verbose", action="store_true", help="also notes, refusals and seconds of every case")
    parser.add_argument("--keep", action="store_true", help="keep all that was computed, also if nothing differs")
    return parser.parse_args()


def run(wanted: argparse.Namespace, folder: Path, sources: tuple[Path, Path]) -> list[Case]:
    """Run and compare all cases, printing those that differ as soon as their graph is done."""
    folders = (folder / SIDES[0], folder / SIDES[1])
    for each in folders:
        each.mkdir()
    known, missing = describe(sources, folders)
    methods = sorted(set(known[0]) & set(known[1]))
    if wanted.methods:
        unknown = set(wanted.methods.split(",")) - set(methods)
        if unknown:
            raise SystemExit(f"not on both sides: {', '.join(sorted(unknown))}")
        methods, missing = wanted.methods.split(","), []
    bits, models = wanted.bits.split(","), wanted.models.split(",")
    shared = {"methods": methods, "bits": bits, "options": options_for(known, methods)}
    cases = [Case(line.split(":")[0], ({}, {}), [line.split(": ")[1]]) for line in missing]
    for case in cases:
        tell(case, wanted, folders)
    pool = ThreadPoolExecutor(wanted.jobs)
    try:
        running = {
            model: [
                pool.submit(work, "run", {"source": str(s), "folder": str(f), "model": model, **shared})
                for s, f in zip(sources, folders, strict=True)
            ]
            for model in models
        }
        for model, sides in running.items():
            for side in sides:
                side.result()
            found = [compare(f"{model} {m} {b}", folders) for m in methods for b in bits]
            exact = compare(f"{model} float", folders)
            for case in [exact, *found] if exact.differences else found:
                tell(case, wanted, folders)
                cases.append(case)
    finally:
        pool.shutdown(cancel_futures=True)
    return cases


def tell(case: Case, wanted: argparse.Namespace, folders: tuple[Path, Path]) -> None:
    if case.differences:
        print(f"DIFFERS {case.name}: {'; '.join(case.differences)}", flush=True)
    elif wanted.verbose:
        outcome = f"both {_outcome(case.results[0])}" if case.refused else "equal"
        seconds = [f"{result['seconds']:.1f}" for result in case.results]
        print(f"{case.name}: {outcome} ({', '.join(seconds)} s)", flush=True)
    if wanted.verbose and case.notes:
        print(f"  note: {'; '.join(case.notes)}", flush=True)
    if wanted.kl and all(r.get("digests") and "error" not in r for r in case.results) and "seconds" in case.results[0]:
        print(f"  {from_float(case, folders)}", flush=True)


def summary(cases: list[Case]) -> str:
    differ, refused = sum(bool(c.differences) for c in cases), [c for c in cases if c.refused]
    kinds = Counter(case.results[0]["error"] for case in refused)
    named = f" ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})" if kinds else ""
    equal = len(cases) - differ - len(refused)
    return f"{len(cases)} cases: {equal} equal, {differ} differ, {len(refused)} same refusal{named}"


def main() -> int:
    wanted, started = arguments(), time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="equivalence-"))
    keep = wanted.keep
    try:
        with worktree(wanted.base, folder / "worktree") as base:
            cases = run(wanted, folder, (base / "src", HERE / "src"))
        keep = keep or any(case.differences for case in cases)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    seconds = [sum(case.results[i].get("seconds", 0) for case in cases) for i in (0, 1)]
    notes = Counter(note.split(":")[0] for case in cases for note in case.notes)
    for note, count in notes.items():
        print(f"note, {count} cases: {note}")
    print(f"{summary(cases)}; {time.perf_counter() - started:.0f} s (base {seconds[0]:.0f}, here {seconds[1]:.0f})")
    if keep:
        print(f"all results: {folder}")
    return int(any(case.differences for case in cases))


if __name__ == "__main__":
    sys.exit(main())
