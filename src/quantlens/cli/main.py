"""`quantlens`: the entry point, and how every command ends when something goes wrong.

Exit codes: 0 done; 1 some cells of a study failed, or a number did not come out again; 2 a mistake a person can mend,
told in one line; 130 Ctrl-C; 143 SIGTERM.
"""

import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from quantlens import plugins
from quantlens._version import __version__
from quantlens.cli import (
    allocate,
    attention,
    bench,
    compare,
    demo,
    evaluate,
    export,
    inspect,
    methods,
    models,
    plot,
    predict,
    quantize,
    recommend,
    report,
    reproduce,
    sources,
    study,
    verify,
)
from quantlens.cli._common import Stopped, add_command
from quantlens.errors import QuantlensError, QuantlensWarning, debugging

# The base of "no such option" and the like. Some versions of typer bring a click of their own, so it is found by name.
CLICK_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="quantlens",
    help="Quantize a vision transformer after training, and see what every bit costs, in and out of distribution.",
    epilog="Start with: quantlens demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    demo,
    recommend,
    quantize,
    allocate,
    inspect,
    evaluate,
    attention,
    export,
    verify,
    predict,
    bench,
    study,
    compare,
    report,
    plot,
    reproduce,
    methods,
    models,
    sources,
)
for _command in COMMANDS:
    add_command(app, _command, plugins=_command not in (plot, models, sources))


WANTED = ("torch", "torchvision", "timm", "scipy", "sklearn", "safetensors", "pydantic", "yaml")
"""Packages that a small machine need not have, which runs exported files."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantlens {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


def main() -> NoReturn:
    """Run a command and exit with its code."""
    # Threads of torch that wait for work otherwise spin, which makes it many times slower on a machine that does other
    # things too. Must stand in the environment before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _mend_streams()
    ended: list[int] = []

    def end(number: int, frame: Any) -> None:
        ended.append(number)
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")

    signal.signal(signal.SIGTERM, end)  # of a container or a batch system: all is left as after Ctrl-C
    code = run(sys.argv[1:])
    sys.exit(128 + ended[0] if ended else code)


def _mend_streams() -> None:
    """Output that is closed (`>&-`) goes nowhere; what an encoding other than UTF-8 cannot say is replaced."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def run(arguments: list[str]) -> int:
    """Run a command; its exit code. Mistakes become one line on stderr; QUANTLENS_DEBUG=1 shows the traceback."""
    program: Any = typer.main.get_command(app)
    try:
        with _short_warnings():
            code = program.main(arguments, prog_name="quantlens", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (Stopped, typer.Abort, KeyboardInterrupt) as error:
        _complain(str(error) or "stopped by Ctrl-C", prefix="")
        return 130
    except typer.Exit as error:
        return int(error.exit_code)
    except CLICK_ERROR as error:
        path = getattr(getattr(error, "ctx", None), "command_path", "quantlens")
        _complain(f"{error.format_message().rstrip('.')}; see `{path} --help`")
        return error.exit_code
    except (BrokenPipeError, SystemExit) as error:  # rich and typer make the latter of the former
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `quantlens models | head`: nothing is left
        return 0
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        if debugging():
            traceback.print_exc()
        _complain(sentence)
        return 2


def _sentence(error: Exception) -> str | None:
    """What is said of an error that a person can mend, or that a plugin's code raised; None for any other."""
    if isinstance(error, QuantlensError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in WANTED:
        return (
            f"the package {error.name} is not installed, and without it only classifiers in .onnx and .xml files are "
            "run (`predict`, `bench`): pip install quantlens, with its dependencies"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if error.filename else ""
        return f"the disk is full{where}; free some space and run the same command again"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{str(error.filename)[:40]}… is too long for the name of a file"
    return plugins.blame(error)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Inside, warnings of quantlens are told in one line on stderr."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, QuantlensWarning):
                _complain(str(message), prefix="warning: ")
            else:
                usual(message, category, *place, **more)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _complain(text: str, prefix: str = "error: ") -> None:
    """One line on stderr."""
    print(prefix + " ".join(text.split()), file=sys.stderr)
