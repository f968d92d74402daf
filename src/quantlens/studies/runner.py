"""Runs a study: every model, method, precision and seed, each finished cell written to the store at once.

A cell's key is a hash of everything that determines its figures; so a finished cell is never run again, a study that
was killed carries on where it was, and a changed study runs only what changed. Several processes may run one study
together: each claims a cell before it runs it, and takes over the claims of processes that are gone.

For each model: load it once, decode each image set once, measure FP32 once; its Result is the reference of all
quantized cells of that model.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlens.errors import QuantlensError, StorageError
from quantlens.studies.backend import Backend
from quantlens.studies.cells import (
    CELL_FORMAT,
    PlannedCell,
    Slot,
    StudyImages,
    cell_key,
    identity,
    plan_study,
    weights_of,
)
from quantlens.studies.config import ModelSpec, StudyConfig, parse_config
from quantlens.studies.environment import cores
from quantlens.studies.images import source_name
from quantlens.studies.progress import Quiet, display
from quantlens.studies.store import Owner, Store, now, to_json

HEARTBEAT_SECONDS = 20.0
POLL_SECONDS = 1.0


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C during a study. `str()` says what is in the store and how to carry on."""


@dataclass
class Summary:
    """What a run did, and how the study stands after it."""

    directory: Path
    planned: int
    done: int
    ran: int
    failed: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def remaining(self) -> int:
        """Cells that are neither done nor failed (a limit stopped the run)."""
        return self.planned - self.done - len(self.failed)

    def __str__(self) -> str:
        text = f"{self.done} of {self.planned} cells done ({self.ran} in this run) in {self.directory}"
        if self.failed:
            text += f"; {len(self.failed)} failed"
        if self.remaining:
            text += f"; {self.remaining} still to run"
        return text


# ---- running ---------------------------------------------------------------------------------------------------------


def run_study(
    config: StudyConfig | Mapping[str, Any],
    out_dir: str | os.PathLike[str],
    *,
    workers: int = 1,
    progress: bool | Quiet = True,
    retry_failed: bool = False,
    limit: int | None = None,
    backend: Backend | None = None,
) -> Summary:
    """Run what is not finished yet of a study, and keep it in `out_dir/store.sqlite`.

    workers: processes that share the work on this machine. progress: a live bar on stderr, or a display of your own.
    retry_failed: run cells again that failed before. limit: run at most so many cells now.

    A cell that raises is recorded as failed with its traceback and the rest goes on. What would stop every cell (images
    that cannot be read, calibration images among the evaluated ones, a full disk) raises QuantlensError. Ctrl-C raises
    `StudyInterrupted`; the store is whole at every moment, and the same call carries on.
    """
    backend = backend or Backend()
    if not isinstance(config, StudyConfig):
        config = parse_config(dict(config))
    for name, value in (("workers", workers), ("limit", limit)):
        if value is not None and value < 1:
            raise QuantlensError(f"{name} is {value}; give at least 1")
    started = time.monotonic()
    shown = display(progress)
    runner = _Runner(config, Path(out_dir), backend, shown, now() if retry_failed else None, limit)
    try:
        runner.begin()
        if workers == 1:
            runner.run()
        else:
            _run_workers(runner, workers)
    except KeyboardInterrupt:
        shown.stop()
        raise StudyInterrupted(runner.interrupted()) from None
    finally:
        shown.stop()
        runner.close()
    summary = runner.summary()
    return replace(summary, seconds=time.monotonic() - started)


class _Runner:
    """One process at work on a study."""

    def __init__(
        self,
        config: StudyConfig,
        directory: Path,
        backend: Backend,
        shown: Quiet,
        retry_before: str | None,
        limit: int | None,
        parent: int | None = None,
    ) -> None:
        self.config, self.directory, self.backend, self.shown = config, directory, backend, shown
        self.retry_before, self.limit, self.parent = retry_before, limit, parent
        self.store = Store(directory)
        self.owner = Owner.me()
        self.ran = 0

        self.cells = plan_study(config, backend)
        if config.scores is not None:
            from quantlens.studies.evaluate import choose_scores

            choose_scores(config.scores)
        for model in config.models:
            backend.check_model(model.name, weights_of(model))
        self.device = backend.device(config.device)
        self.images = StudyImages.open(config, backend)
        self.identities = {cell.slot: identity(cell, config, self.images) for cell in self.cells}

    # -- life --

    def begin(self) -> None:
        """Make this study the store's current one."""
        identities = list(self.identities.values())
        self.store.begin(self.config.name, self.config.to_dict(), self.backend.environment(self.device), identities)

    def close(self) -> None:
        """Give up this process's claims, and close the store."""
        with suppress(StorageError):  # what broke the store has been told already
            if self.store.exists():
                self.store.release(self.owner)
        self.store.close()

    def interrupted(self) -> str:
        """How the study stands after Ctrl-C, and how to carry on."""
        counts = {"done": 0, "failed": 0}
        with suppress(StorageError):
            counts = self.store.counts()
        finished = counts["done"] + counts["failed"]
        return (
            f"stopped; {finished} of {len(self.cells)} cells are finished and kept in {self.store.path}; run the same "
            "command again to carry on"
        )

    def summary(self) -> Summary:
        counts = self.store.counts()
        failed = [(_label(spec), _reason(error)) for spec, error in self.store.failures()]
        self.store.close()
        return Summary(self.directory, len(self.cells), counts["done"], self.ran, failed)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Keep this process's claims alive from a thread of its own."""
        over = threading.Event()

        def beat() -> None:
            with Store(self.directory) as store:
                while not over.wait(HEARTBEAT_SECONDS):
                    try:
                        store.beat(self.owner)
                    except StorageError:
                        store.close()  # the cell itself will report a store that stays broken

        thread = threading.Thread(target=beat, name="quantlens-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    # -- work --

    def run(self) -> None:
        """Run all that can be run; then wait for what other processes hold, and take over what they leave."""
        groups = [_Group(model, [c for c in self.cells if c.model == model]) for model in self.config.models]
        self.shown.start(len(self.cells), 0)
        with self.beating():
            for group in groups:
                if self.spent():
                    return
                self.run_group(group)
            told = False
            while any(group.left for group in groups) and not self.spent():
                if not told:
                    held = sum(len(group.left) for group in groups)
                    self.shown.message(f"waiting for {held} cells that other processes run on this store")
                    told = True
                time.sleep(POLL_SECONDS)
                for group in groups:
                    if group.left and self.ready(group):
                        self.run_group(group)
                        told = False

    def spent(self) -> bool:
        """Whether to stop: the limit is reached, or the process that started this worker is gone."""
        if self.parent is not None and os.getppid() != self.parent:
            return True
        return self.limit is not None and self.ran >= self.limit

    def drop_finished(self, group: _Group) -> None:
        """Forget the cells of a group that are finished, by an earlier run or by another process."""
        finished = self.store.finished((group.keys[cell.slot] for cell in group.left), self.retry_before)
        left = [cell for cell in group.left if group.keys[cell.slot] not in finished]
        self.shown.skipped(len(group.left) - len(left))
        group.left = left

    def ready(self, group: _Group) -> bool:
        """Whether a cell of the group could be claimed now."""
        self.drop_finished(group)
        first = group.left[:1]
        waited_for = first if first and first[0].method is None else group.left
        return any(not self.store.taken(group.keys[cell.slot], self.owner) for cell in waited_for)

    def run_group(self, group: _Group) -> None:
        """All cells of one model that are free."""
        spec = group.model
        self.shown.working(f"loading {spec.label}")
        try:
            model = self.backend.load_model(spec.name, weights_of(spec), self.device, spec.options)
        except (KeyboardInterrupt, StorageError):
            raise
        except Exception as error:
            if _is_full_disk(error):
                raise
            self.not_loaded(group, error)
            return
        preprocess = model.preprocess.to_dict()
        group.keys = {
            cell.slot: cell_key(cell, self.config, self.images, str(model.checkpoint_sha256), preprocess)
            for cell in group.cells
        }
        self.store.bind({self.identities[cell.slot]: group.keys[cell.slot] for cell in group.cells})
        specs = {cell.slot: self.spec(cell, model) for cell in group.cells}
        self.relabel(group, specs)
        self.drop_finished(group)
        if not group.left:
            return
        work = _ModelWork(self, model, specs)
        try:
            for cell in list(group.left):
                if self.spent():
                    break
                outcome = self.run_cell(cell, group, work)
                if outcome == "taken" and cell.method is None:
                    break  # another process measures FP32, the reference of all the others
                if outcome != "taken":
                    group.left.remove(cell)
        finally:
            del work, model
            self.backend.free(more_to_come=False)

    def run_cell(self, cell: PlannedCell, group: _Group, work: _ModelWork) -> str:
        """Claim and run one cell. "ran", "taken" by another process, or finished already."""
        key = group.keys[cell.slot]
        outcome = self.store.claim(key, self.owner, self.retry_before)
        if outcome != "mine":
            if outcome != "taken":
                self.shown.skipped(1)
            return outcome
        self.shown.working(str(cell))
        started = time.perf_counter()
        error: str | None = None
        result: dict[str, Any] | None = None
        try:
            result = work.measure(cell, group)
        except (KeyboardInterrupt, StorageError):
            raise
        except Exception as problem:
            if _is_full_disk(problem):
                raise
            error = "".join(traceback.format_exception(problem))
        seconds = time.perf_counter() - started
        status = "done" if error is None else "failed"
        self.store.put(key, work.specs[cell.slot], status, result, error, seconds)
        self.ran += 1
        self.shown.finished(cell.kind, str(cell), seconds, None if error is None else _reason(error))
        self.backend.free()
        return "ran"

    def not_loaded(self, group: _Group, error: Exception) -> None:
        """The model of a group cannot be loaded: its cells failed, and are tried again by every run."""
        text = "".join(traceback.format_exception(error))
        for cell in list(group.left):
            mark = self.identities[cell.slot]
            key = f"not-loaded-{mark}"
            self.store.bind({mark: key})
            self.store.put(key, self.spec(cell, None), "failed", None, text, 0.0)
            group.left.remove(cell)
            self.ran += 1
            self.shown.finished(cell.kind, str(cell), 0.0, _reason(text))

    def spec(self, cell: PlannedCell, model: Any) -> dict[str, Any]:
        """What a cell is, for a reader of the store: with the labels and sources that this study uses."""
        config, images = self.config, self.images
        calibration = None
        if cell.method is not None and config.calibration is not None:
            drawn = images.calibration[cell.seed]
            calibration = {
                "source": config.calibration.drawn(cell.seed),
                "n": len(drawn),
                "fingerprint": images.mark(drawn),
            }

        def listed(source: Any) -> dict[str, Any]:
            return {"source": source_name(source), "fingerprint": images.mark(source), "n": len(source)}

        return {
            "model": cell.model.label,
            "architecture": cell.model.name,
            "weights": cell.model.weights,
            "model_options": cell.model.options,
            "checkpoint_sha256": None if model is None else model.checkpoint_sha256,
            "method": cell.method_label,
            "method_name": "fp32" if cell.method is None else cell.method.name,
            "method_version": None if cell.method is None else cell.method.version,
            "bits": cell.bits,
            "seed": cell.seed,
            "options": {} if cell.method is None else cell.method.options,
            "calibration": calibration,
            "id": listed(images.id),
            "ood": {name: {**listed(s), "group": images.groups[name]} for name, s in images.ood.items()},
            "fit": None if images.fit is None else listed(images.fit),
            "scores": None if config.scores is None else list(config.scores),
            "preprocess": None if model is None else model.preprocess.to_dict(),
            "format": CELL_FORMAT,
            **({} if config.attention is None else {"attention": config.attention.model_dump()}),
        }

    def relabel(self, group: _Group, specs: Mapping[Slot, Mapping[str, Any]]) -> None:
        """Give cells that were finished under other labels or paths those of this study."""
        for cell in group.cells:
            key, spec = group.keys[cell.slot], specs[cell.slot]
            if self.store.spec(key) in (None, to_json(spec)):
                continue
            known = self.store.cell(key)
            if known is not None:
                self.store.rewrite(key, spec, None if known.result is None else relabelled(known.result, spec))


class _ModelWork:
    """A loaded model and the decoded images it is measured on."""

    def __init__(self, runner: _Runner, model: Any, specs: dict[Slot, dict[str, Any]]) -> None:
        self.runner, self.model, self.specs = runner, model, specs
        images = runner.images
        self.id = self.load(images.id, "the ID set")
        self.ood = {name: self.load(source, f"OOD set {name}") for name, source in images.ood.items()}
        self.fit = None if images.fit is None else self.load(images.fit, "the fit set")
        self.calibration: dict[int, Any] = {}
        self.groups = images.groups
        self.reference: Any = None

    def load(self, source: Any, what: str) -> Any:
        runner = self.runner
        cache = runner.config.cache
        return runner.backend.load_images(
            source,
            self.model.preprocess,
            cache_dir=None if cache is True else cache,
            skip_bad=runner.config.skip_bad,
            progress=lambda done, total: runner.shown.step(f"decoding {what}", done, total),
        )

    def measure(self, cell: PlannedCell, group: _Group) -> dict[str, Any]:
        """The result dict of a cell."""
        runner, config = self.runner, self.runner.config
        started = time.perf_counter()
        if cell.method is None:
            measured, reference = self.model, False
        else:
            reference = self.fp32(group)
            measured = runner.backend.quantize(
                self.model,
                self.calibrate(cell.seed),
                cell.method,
                cell.bits,
                cell.seed,
                lambda done, total: runner.shown.step("calibrating", done, total),
            )
        seconds = time.perf_counter() - started
        result = runner.backend.evaluate(
            measured,
            self.id,
            self.ood,
            fit=self.fit,
            reference=reference,
            scores=config.scores,
            groups=self.groups,
            batch_size=config.batch_size,
            progress=runner.shown.step,
        )
        if cell.method is None:
            self.reference = result
        data = result.to_dict()
        if cell.method is not None:
            data["seconds"] = {**data["seconds"], "calibration": seconds}
        if config.attention is not None:
            started = time.perf_counter()
            look = runner.backend.attention
            data |= look(measured, self.model, self.id, self.ood, config.attention, runner.shown.step)
            data["seconds"] = {**data["seconds"], "attention": time.perf_counter() - started}
        spec = self.specs[cell.slot]
        return relabelled(data, spec)

    def fp32(self, group: _Group) -> Any:
        """The FP32 Result of this model: measured in this process, or read from the store."""
        if self.reference is None:
            from quantlens.studies.evaluate import Result

            own = next(cell for cell in group.cells if cell.method is None)
            stored = self.runner.store.cell(group.keys[own.slot])
            if stored is None or stored.result is None:
                reason = "it is missing" if stored is None else _reason(stored.error)
                raise QuantlensError(f"{group.model.label} could not be measured at FP32 ({reason})")
            # Labels are a study's own; the evaluation knows the model by its method.
            self.reference = Result.from_dict({**stored.result, "method": "fp32"})
        return self.reference

    def calibrate(self, seed: int) -> Any:
        """The decoded calibration images of a seed."""
        if seed not in self.calibration:
            assert self.runner.config.calibration is not None
            images = self.load(self.runner.images.calibration[seed], "the calibration images")
            wanted = self.runner.config.calibration.n
            if len(images) < wanted and not self.runner.config.skip_bad:
                raise QuantlensError(
                    f"{source_name(images)} gave {len(images)} calibration images, not {wanted}; give a larger source"
                )
            self.calibration[seed] = images
        return self.calibration[seed]


@dataclass
class _Group:
    """The cells of one model, and which of them are not finished as far as this process knows."""

    model: ModelSpec
    cells: list[PlannedCell]
    keys: dict[Slot, str] = field(default_factory=dict)
    left: list[PlannedCell] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = list(self.cells)


def relabelled(result: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """A result under the labels and sources of a spec; its figures are untouched."""
    changed = dict(result)
    changed["model"], changed["method"] = spec["model"], spec["method"]
    changed["architecture"], changed["method_name"] = spec["architecture"], spec["method_name"]
    changed["calibration"] = None if spec["calibration"] is None else dict(spec["calibration"])
    changed["id"] = {**result["id"], "source": spec["id"]["source"]}
    changed["ood"] = {name: {**entry, "source": spec["ood"][name]["source"]} for name, entry in result["ood"].items()}
    if result.get("fit") and spec.get("fit"):
        changed["fit"] = {**result["fit"], "source": spec["fit"]["source"]}
    return changed


def _is_full_disk(error: BaseException) -> bool:
    """A disk that is full stops the study: every further cell would fail for the same reason."""
    import errno

    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _reason(error: str | None) -> str:
    """The last line of a traceback, without the exception's module."""
    lines = (error or "").strip().splitlines()
    last = lines[-1] if lines else "unknown reason"
    name, colon, message = last.partition(": ")
    return f"{message}" if colon and name.startswith("quantlens.errors.") else last


def _label(spec: Mapping[str, Any]) -> str:
    if spec.get("method_name") == "fp32":
        return f"{spec.get('model')} FP32"
    return f"{spec.get('model')} {spec.get('method')} {spec.get('bits')} seed {spec.get('seed')}"


# ---- several processes -----------------------------------------------------------------------------------------------


def _run_workers(runner: _Runner, workers: int) -> None:
    """Start worker processes on this store, and show how it fills."""
    context = multiprocessing.get_context("spawn")
    told, errors = context.Pipe(duplex=False)
    threads = max(1, cores() // workers)
    arguments = (runner.config, runner.directory, runner.backend, runner.retry_before, threads, os.getpid(), errors)
    limits = _shares(runner.limit, workers)
    processes = [
        context.Process(target=_worker, args=(*arguments, limit), name=f"quantlens-worker-{i}")
        for i, limit in enumerate(limits)
    ]
    mark = runner.store.last()
    runner.shown.start(len(runner.cells), 0)
    runner.shown.parallel = len(processes)
    runner.shown.working(f"{len(processes)} processes")
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        # Workers that are ended leave locks of their libraries behind, which Python removes, and says so.
        "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
    }
    with _no_interrupts(), _environment(variables):
        for process in processes:
            process.start()
    known = failures = 0
    try:
        alive = True
        while alive:
            alive = any(p.is_alive() for p in processes)
            time.sleep(0.3 if alive else 0)
            for number, spec, seconds, error in runner.store.since(mark):
                mark = number
                kind = "fp32" if spec["method_name"] == "fp32" else str(spec["method"])
                runner.ran += 1
                failures += error is not None
                runner.shown.finished(kind, _label(spec), seconds, None if error is None else _reason(error))
            counts = runner.store.counts()
            earlier = counts["done"] - (runner.ran - failures)
            if runner.retry_before is None:
                earlier += counts["failed"] - failures
            if earlier > known:
                runner.shown.skipped(earlier - known)
                known = earlier
    except KeyboardInterrupt:
        for process in processes:  # their claims are void once they are gone
            process.terminate()
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        raise
    for process in processes:
        process.join()
    if told.poll():
        raise QuantlensError(told.recv())
    crashed = [p for p in processes if p.exitcode]
    if crashed:
        raise QuantlensError(
            f"{len(crashed)} of {workers} workers ended with exit code {crashed[0].exitcode} (out of memory?); "
            "finished cells are kept: run the same command again, perhaps with fewer workers"
        )


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that processes started inside inherit, unless the person has set them."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _shares(limit: int | None, workers: int) -> Sequence[int | None]:
    """A limit divided among workers."""
    if limit is None:
        return [None] * workers
    return [limit // workers + (i < limit % workers) for i in range(min(workers, max(1, limit)))]


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C: their parent ends them, in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _worker(
    config: StudyConfig,
    directory: Path,
    backend: Backend,
    retry_before: str | None,
    threads: int,
    parent: int,
    errors: Any,
    limit: int | None,
) -> None:
    """One worker process. Errors a person can mend go back to the parent as a sentence."""
    try:
        backend.set_threads(threads)
        runner = _Runner(config, directory, backend, Quiet(), retry_before, limit, parent)
        try:
            runner.run()
        finally:
            runner.close()
    except QuantlensError as error:
        errors.send(str(error))
    except OSError as error:
        if not _is_full_disk(error):
            raise
        errors.send(f"the disk is full ({error}); free some space and run the same command again")
