"""What the commands share: how they are added to the program, what they print, and the reading of option values.

Results go to stdout, progress and messages to stderr. Nothing heavy is imported at the top.
"""

import ast
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from inspect import Parameter, signature
from json import dumps
from pathlib import Path
from typing import Any

from quantlens._moved import arguments_apart
from quantlens.cli import _options
from quantlens.errors import QuantlensError
from quantlens.files import write_whole
from quantlens.plugins import load_all

PIPED_WIDTH, NARROW = 140, 76
"""Columns of a table that goes to a file or another program; and of a terminal on which a title is still one line."""


# ---- commands --------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Ctrl-C, on its way through typer (which would keep its message to itself)."""


def add_command(app: Any, module: Any, *, plugins: bool) -> None:
    """Add a module's command: the function of its name, told by its HELP. plugins: it has the option --plugin, which is
    obeyed before it runs. A function with a parameter ``settings`` gets what a method is called with, from --option and
    from what every method takes, checked."""
    name = module.__name__.rpartition(".")[2]
    function = getattr(module, name)
    own = signature(function, eval_str=True)
    shared = {key: kind for key, kind in _options.ARGUMENTS.items() if key not in own.parameters}
    added: dict[str, Any] = {"plugin": _options.Plugins} if plugins else {}
    if "settings" in own.parameters:
        added = {"option": _options.MethodOptions, **shared, **added}

    @wraps(function)
    def guarded(**options: Any) -> None:
        try:
            if plugins:
                load_all(names(options.pop("plugin")))
            if "settings" in own.parameters:
                given = {key: options.pop(key) for key in shared}
                options["settings"] = method_settings(options.pop("option"), **given)
                from quantlens.methods import registry

                registry.get(options["method"]).options(options["settings"])  # before anything is loaded
            function(**options)
            sys.stdout.flush()
        except KeyboardInterrupt as error:
            raise Stopped(str(error)) from error

    kept = [parameter for key, parameter in own.parameters.items() if key != "settings"]
    by_name = partial(Parameter, kind=Parameter.KEYWORD_ONLY, default=None)
    more = [by_name(key, annotation=kind) for key, kind in added.items()]
    guarded.__signature__ = own.replace(parameters=[*kept, *more])  # type: ignore[attr-defined]
    guarded.__annotations__ = {**function.__annotations__, **added}
    app.command(name, help=_unwrapped(module.HELP))(guarded)


def _unwrapped(text: str) -> str:
    """A help text with each paragraph on one line, as terminals break lines themselves; indented ones stay."""
    parts = text.strip().split("\n\n")
    return "\n\n".join(part if part.startswith("    ") else " ".join(part.split("\n")) for part in parts)


# ---- what is printed -------------------------------------------------------------------------------------------------


def console(*, stderr: bool = False) -> Any:
    """The console of results, or of progress and messages; texts are shown as they are, none is markup."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not stderr and not made.is_terminal:
        made.width = PIPED_WIDTH
    return made


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]] = (),
    *,
    right: Collection[str] = (),
    whole: Collection[str] = (),
    **look: Any,
) -> Any:
    """A table of rich. right: heads of the columns of numbers; whole: of those that are never broken into lines."""
    from rich.table import Table

    wide = min(max((len(str(look.get(key) or "")) for key in ("title", "caption")), default=0), NARROW)
    made = Table(**{"title_justify": "left", "caption_justify": "left", "min_width": wide, **look})
    for head in heads:
        made.add_column(head, justify="right" if head in right else "left", overflow="fold", no_wrap=head in whole)
    for row in rows:
        made.add_row(*row)
    return made


def show(parts: Iterable[Any], data: Any, file: str | Path | None, what: str) -> None:
    """Print a result: its parts, or with the file ``-`` of --json its data alone; and write the data to any other file.
    what: what it is, for the error."""
    text = dumps(data, indent=1, allow_nan=False)
    if str(file) == "-":
        print(text)
        return
    out = console()
    for part in parts:
        out.print(part, soft_wrap=isinstance(part, str))
    if file is not None:
        write_whole(Path(file), text + "\n", what=what)
        print(f"written: {file}")


@contextmanager
def stages(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, total) that shows one bar per stage on a terminal; elsewhere a line now and then, with
    the time that is left, of a stage that takes minutes."""
    out = console(stderr=True)
    if quiet:
        yield lambda what, done, total: None
        return
    if not out.is_terminal:
        yield _Estimate()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=out, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield step


class _Estimate:
    """Lines on stderr: how far a stage is and how long it will go on, :data:`FIRST` seconds after it began where more
    than a minute is left, and every :data:`AGAIN` seconds."""

    FIRST, AGAIN = 10.0, 300.0

    def __init__(self) -> None:
        self.began: dict[str, tuple[float, int]] = {}
        self.told: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done <= self.began.get(what, (now, done))[1]:  # it begins, or begins again (with the FP32 model)
            self.began[what] = now, done
            self.told.pop(what, None)
        start, first = self.began[what]
        passed, new = now - start, done - first
        due = passed >= self.FIRST if what not in self.told else now - self.told[what] >= self.AGAIN
        left = passed / new * (total - done) if new else 0.0
        if due and left > 60:
            self.told[what] = now
            print(f"{what}: {done} of {total}, about {left / 60:.0f} min left", file=sys.stderr, flush=True)


# ---- values of options -----------------------------------------------------------------------------------------------


def names(values: Sequence[str] | None) -> list[str]:
    """Values of an option that may be repeated and may hold commas: `-m a,b -m c` is a, b, c."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def whole_numbers(values: Sequence[str] | None, option: str) -> list[int]:
    """Seeds and the like: `0,13,37`."""
    texts = names(values)
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise QuantlensError(f"{option} {','.join(texts)!r}: write whole numbers, such as {option} 0,13,37") from None


def pairs(values: Sequence[str] | None, option: str, meaning: str = "NAME=SOURCE") -> dict[str, str]:
    """NAME=VALUE options as a dictionary; a name given twice, or no `=`, is an error."""
    found: dict[str, str] = {}
    for value in values or ():
        name, _, rest = value.partition("=")
        if not name.strip() or not rest:
            raise QuantlensError(f"{option} {value!r}: write {option} {meaning}")
        if name in found:
            raise QuantlensError(f"{option} gives {name!r} twice; give each name once")
        found[name.strip()] = rest
    return found


def settings(values: Sequence[str] | None) -> dict[str, Any]:
    """`--option key=value` pairs with values read as Python literals where they are (0.5, true, none), else as text."""
    words = {"true": True, "false": False, "none": None, "null": None}

    def read(text: str) -> Any:
        try:
            return words[text.lower()] if text.lower() in words else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    return {name.replace("-", "_"): read(text) for name, text in pairs(values, "--option", "KEY=VALUE").items()}


def method_settings(option: Sequence[str] | None, **arguments: Any) -> dict[str, Any]:
    """What a method is called with: its own options (`--option`), and what every method takes."""
    shared, own = arguments_apart(settings(option), lambda name: f"--{name.replace('_', '-')}")
    return {**own, **shared, **{name: value for name, value in arguments.items() if value is not None}}


def reading(skip_bad: bool, no_cache: bool) -> dict[str, Any]:
    """How images are read, as `data.as_image_set` and all above it take it."""
    return {"skip_bad": skip_bad, "cache_dir": False if no_cache else None}


def open_run(
    step: Callable[[str, int, int], None],
    model: str,
    weights: str | None,
    device: str,
    source: str,
    n: int | None,
    seed: int,
    input_size: int | None = None,
    task: str | None = None,
    letterbox: bool = False,
    **reading: Any,
) -> tuple[Any, Any]:
    """(float model, calibration images as it reads them) of a command line: what the commands that quantize begin with.
    step: of :func:`stages`. reading: of :func:`reading`."""
    from quantlens.data import as_image_set
    from quantlens.data.sources import NO_IMAGES, open_calibration
    from quantlens.evaluation.open_models import open_float

    images = open_calibration(source, n, seed)
    if source == NO_IMAGES:
        print(f"no calibration images: {len(images)} are made, {images.spec}", file=sys.stderr)
    loaded = open_float(model, weights, device, input_size, task, letterbox)
    told = partial(step, "decoding calibration images")
    return loaded, as_image_set(images, loaded.preprocess, progress=told, **reading)
