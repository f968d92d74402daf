"""What the commands share: consoles, progress on stderr, and the reading of option values.

Results go to stdout, progress and messages to stderr. Nothing heavy is imported at the top.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from quantlens.cli import _options
from quantlens.errors import QuantlensError
from quantlens.plugins import load_all

PIPED_WIDTH = 140
"""Columns of a table that goes to a file or another program."""


def unwrap(text: str) -> str:
    """A help text with each paragraph on one line, as terminals break lines themselves; indented ones stay."""
    parts = text.strip().split("\n\n")
    return "\n\n".join(part if part.startswith("    ") else " ".join(part.split("\n")) for part in parts)


class Stopped(Exception):
    """Ctrl-C, on its way through typer (which would keep its message to itself)."""


class ReaderGone(Exception):
    """Nobody reads stdout any more, on its way through typer."""


def command(app: Any, name: str, help: str, function: Callable[..., None], *, plugins: bool = True) -> None:
    """Add a command to the program. plugins: it has the option --plugin, which is obeyed before it runs."""
    import functools

    @functools.wraps(function)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            if plugins:
                load_all(names(options.pop("plugin", None)) or [])
            function(*arguments, **options)
            sys.stdout.flush()
        except KeyboardInterrupt as error:
            raise Stopped(str(error)) from error
        except BrokenPipeError as error:
            raise ReaderGone from error

    if plugins:
        own = inspect.signature(function, eval_str=True)
        option = inspect.Parameter("plugin", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_options.Plugins)
        guarded.__signature__ = own.replace(parameters=[*own.parameters.values(), option])  # type: ignore[attr-defined]
        guarded.__annotations__ = {**function.__annotations__, "plugin": _options.Plugins}
    app.command(name, help=unwrap(help))(guarded)


def stdout() -> Any:
    """The console of results; texts are shown as they are, none is markup."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


def stderr() -> Any:
    """The console of progress and messages."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """A line on stdout as it is: no markup, no wrapping."""
    print(text)


@contextmanager
def stages(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, total) that shows one bar per stage on a terminal, and nothing elsewhere."""
    console = stderr()
    if quiet or not console.is_terminal:
        yield lambda what, done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield step


def names(values: Sequence[str] | None) -> list[str] | None:
    """Values of an option that may be repeated and may hold commas: `-m a,b -m c` is a, b, c."""
    if not values:
        return None
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def pairs(values: Sequence[str] | None, option: str, meaning: str) -> dict[str, str]:
    """NAME=VALUE options as a dictionary; a name given twice, or no `=`, is an error."""
    found: dict[str, str] = {}
    for value in values or ():
        name, equals, rest = value.partition("=")
        if not equals or not name.strip() or not rest:
            raise QuantlensError(f"{option} {value!r}: write {option} {meaning}")
        if name in found:
            raise QuantlensError(f"{option} gives {name!r} twice; give each name once")
        found[name.strip()] = rest
    return found


def settings(values: Sequence[str] | None) -> dict[str, Any]:
    """`--option key=value` pairs with values read as Python literals where they are (0.5, true, none), else as text."""
    words = {"true": True, "false": False, "none": None, "null": None}

    def read(text: str) -> Any:
        if text.lower() in words:
            return words[text.lower()]
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    return {name.replace("-", "_"): read(text) for name, text in pairs(values, "--option", "KEY=VALUE").items()}


def cache_argument(no_cache: bool) -> bool | None:
    """The `cache_dir` of `load_images`."""
    return False if no_cache else None


def open_run(
    model: str,
    weights: str | None,
    source: Any,
    device: str,
    step: Callable[[str, int, int], None],
    *,
    skip_bad: bool,
    no_cache: bool,
    what: str = "calibration images",
) -> tuple[Any, Any]:
    """(float model, images as it reads them) of a command line: what `quantize`, `allocate` and `inspect` begin with.

    source: an opened Source. step: of :func:`stages`. what: the images.
    """
    from quantlens.data import as_image_set
    from quantlens.evaluation.environment import choose_device
    from quantlens.evaluation.open_models import weights_named
    from quantlens.models import load_model

    place = choose_device(device)
    loaded = load_model(model, weights_named(weights), device=place)
    told = partial(step, f"decoding {what}")
    cache = cache_argument(no_cache)
    return loaded, as_image_set(source, loaded.preprocess, cache_dir=cache, skip_bad=skip_bad, progress=told)


def whole_numbers(values: Sequence[str] | None, option: str) -> list[int] | None:
    """Seeds and the like: `0,13,37`."""
    texts = names(values)
    if texts is None:
        return None
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise QuantlensError(f"{option} {','.join(texts)!r}: write whole numbers, such as {option} 0,13,37") from None
