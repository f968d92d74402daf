"""What a person writes outside the package: a method, a format, a score, a transform.

A plugin is a module that registers what it defines when it is imported. It is found by :func:`load_plugin` (a file, or
a module's name; `--plugin` on the command line), by the environment variable QUANTLENS_PLUGINS, or by an entry point of
an installed distribution. The last two are looked at when a :class:`Registry` is asked for a name it does not know, or
for all its names: what quantlens has itself is found without running anybody else's code.
"""

import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from quantlens.arguments import checked
from quantlens.errors import QuantlensError, QuantlensWarning, UnknownNameError, debugging

GROUPS = ("quantlens.methods", "quantlens.formats", "quantlens.scores", "quantlens.transforms")
"""Groups of entry points. One names a module, or what is to be registered itself."""

VARIABLE = "QUANTLENS_PLUGINS"
"""Files and modules to load, separated as in PATH."""

T = TypeVar("T")


class PluginWarning(QuantlensWarning):
    """An installed plugin cannot be used; the others can."""


_found: list[tuple[str, Any, str, str]] = []
"""What was loaded: what a person calls the plugin, the module or thing, group and name of its entry point (or "")."""
_given: dict[str, str] = {}
"""What was given to :func:`load_plugin` (a file: its whole path) -> the digest of the file that was run."""
_places: dict[str, str] = {}
"""Module or package of a plugin's code -> what a person calls it."""
_problems: list[str] = []
"""What keeps installed plugins from being used."""
_registries: "list[Registry[Any]]" = []
_scanned = False


# ---- registries ------------------------------------------------------------------------------------------------------


class Registry(Generic[T]):
    """Things of one kind by name, those of plugins included.

    what: the kind, in messages. group: its entry points. hint: where a person finds the names. own: imports what
    quantlens has itself. adopt: registers what a plugin is (a module) or an entry point names, where that has not
    registered itself: called with the entry point's name ("" without one) and the thing.
    """

    def __init__(
        self,
        what: str,
        group: str,
        *,
        hint: str = "",
        own: Callable[[], object] = lambda: None,
        adopt: Callable[[str, Any], object] = lambda name, thing: None,
    ) -> None:
        assert group in GROUPS
        self.what, self.group, self.hint = what, group, hint
        self._own: Callable[[], object] | None = own
        self._adopt, self._adopted = adopt, 0
        self._things: dict[str, tuple[T, Any]] = {}
        _registries.append(self)

    def add(self, thing: T, *names: str, maker: Any = None) -> None:
        """Register a thing under its names. maker: the class or function that it comes from, by default itself; only
        the same one, defined again, replaces a thing. Raises QuantlensError for a name that is taken."""
        self._ready()
        maker = thing if maker is None else maker
        for name in names:
            known = self._things.get(name, (None, maker))[1]
            if known is not maker and _address(known) != _address(maker):
                raise QuantlensError(
                    f"the {self.what} name {name!r} is taken by {_spelled(known)}; give {_spelled(maker)} another one"
                )
        self._things.update(dict.fromkeys(names, (thing, maker)))

    def find(self, name: str) -> T | None:
        """The thing of that name, looked for in plugins where quantlens has none."""
        self._ready()
        if name not in self._things:
            self._ready(installed=True)
        return self._things.get(name, (None, None))[0]

    def get(self, name: str, *, asked: str = "", suggest: bool = True) -> T:
        """As :meth:`find`; raises UnknownNameError, which says ``asked`` instead of the name where that is given."""
        thing = self.find(name)
        if thing is None:
            hint = "; ".join(part for part in (self.hint, *_problems) if part)
            raise UnknownNameError(self.what, asked or name, self._things if suggest else (), hint)
        return thing

    def all(self, *, own: bool = False) -> dict[str, T]:
        """All things by name, in the order in which they came. own: only those of quantlens."""
        self._ready(installed=not own)
        return {name: thing for name, (thing, _) in self._things.items() if not own or not self.place(name)}

    def place(self, name: str) -> str:
        """The plugin that a known name comes from; "" for quantlens."""
        return _place(_address(self._things[name][1])[0])

    def _ready(self, installed: bool = False) -> None:
        if self._own is not None:
            own, self._own = self._own, None
            own()
        if installed:
            _load_installed()
        while self._adopted < len(_found):
            place, thing, group, name = _found[self._adopted]
            self._adopted += 1
            if group not in ("", self.group) or any(maker is thing for _, maker in self._things.values()):
                continue
            try:
                self._adopt(name, thing)
            except QuantlensError as error:
                if not group:
                    raise QuantlensError(_sentence(place, error)) from error
                _note(place, error)


def _address(maker: Any) -> tuple[str, str]:
    return str(getattr(maker, "__module__", "")), str(getattr(maker, "__qualname__", repr(maker)))


def _place(module: str) -> str:
    """What a person calls the plugin that a module belongs to; "" for quantlens."""
    if module.split(".")[0] == "quantlens":
        return ""
    return next((place for name, place in _places.items() if f"{module}.".startswith(f"{name}.")), module)


def _spelled(maker: Any) -> str:
    module, name = _address(maker)
    return f"{name} ({_place(module) or module})"


# ---- loading ---------------------------------------------------------------------------------------------------------


@checked
def load_plugin(where: str | os.PathLike[str]) -> ModuleType:
    """Load a plugin, and return its module: a file (my_method.py), or a module that Python finds (my_package.method).

    A file is run again only if it has changed; its folder is added to the end of `sys.path`. Raises QuantlensError, in
    one sentence that names the plugin and the cause.
    """
    text = os.fspath(where)
    path = Path(text).expanduser().resolve()
    is_file = text.endswith(".py") or "/" in text or os.sep in text
    if is_file and not path.is_file():
        raise QuantlensError(f"there is no plugin {text}; give a Python file, or the name of a module")
    try:
        if is_file:
            return _run(path, text)
        module = import_module(text)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{text}.".startswith(f"{error.name}."):
            file = f", or {text}.py for the file of that name" if Path(f"{text}.py").is_file() else ""
            raise QuantlensError(f"plugin {text}: there is no such module; give one that Python finds{file}") from error
        raise QuantlensError(_sentence(text, error)) from error
    _given[text] = ""
    _remember(text, module)
    return module


def load_all(given: Sequence[str] = ()) -> None:
    """Load the plugins of QUANTLENS_PLUGINS, and these."""
    for where in (*os.environ.get(VARIABLE, "").split(os.pathsep), *given):
        if where.strip():
            load_plugin(where.strip())


def _load_installed() -> None:
    """Load what QUANTLENS_PLUGINS and entry points name, once. An entry point that fails is left out, and noted."""
    global _scanned
    if _scanned:
        return
    from importlib.metadata import entry_points

    load_all()
    _scanned = True
    points = [point for group in GROUPS for point in entry_points(group=group)]
    for point in sorted(points, key=lambda point: (GROUPS.index(point.group), point.name)):
        place = point.value
        if point.dist is not None:
            place = f"{point.name} of {point.dist.name} {point.dist.version} ({point.value})"
        try:
            thing = point.load()
        except (Exception, SystemExit) as error:
            _note(place, error)
        else:
            _remember(place, sys.modules[point.module], thing, point.group, point.name)


def given() -> list[str]:
    """What was loaded by :func:`load_plugin`, so that another process can load it too."""
    return list(_given)


def _run(path: Path, place: str) -> ModuleType:
    """The module of a file, run if it has not been run as it is now."""
    name = f"quantlens_plugins.{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    source = path.read_bytes()
    digest = sha256(source).hexdigest()
    if name in sys.modules and _given.get(str(path)) == digest:
        return sys.modules[name]
    module = ModuleType(name)
    sys.modules[name] = module
    module.__file__ = str(path)
    _given[str(path)], _places[name] = digest, place
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[name], _given[str(path)]
        raise
    _remember(place, module)
    return module


def _remember(place: str, module: ModuleType, thing: Any = None, group: str = "", name: str = "") -> None:
    top = module.__name__.split(".")[0]  # the code of a package is all that is in it
    _places[module.__name__ if top == "quantlens_plugins" else top] = place
    _found.append((place, module if thing is None else thing, group, name))


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def blame(error: BaseException) -> str | None:
    """The sentence for an error that a plugin's code raised while it was used; None for any other error."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        place = _place(frame.f_globals.get("__name__", ""))
        if place in _places.values():
            return f"plugin {place} failed: {_cause(error)} ({_line(frame, line)}); {_DEBUG}"
    return None


_DEBUG = "QUANTLENS_DEBUG=1 shows the traceback"


def _sentence(place: str, error: BaseException) -> str:
    """What keeps a plugin from being loaded: the error, and the plugin's own line that it came from."""
    frames = traceback.walk_tb(error.__traceback__)
    ours = ("quantlens", "importlib")
    own = [where for where in frames if where[0].f_globals.get("__name__", "").split(".")[0] not in ours]
    return f"plugin {place} cannot be loaded: {_cause(error)}{f' ({_line(*own[0])})' if own else ''}; {_DEBUG}"


def _line(frame: Any, line: int) -> str:
    return f"{Path(frame.f_code.co_filename).name}, line {line}"


def _cause(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, QuantlensError) else f"{type(error).__name__}: {text}"


def _note(place: str, error: BaseException) -> None:
    """Keep what is wrong with an installed plugin, and warn of it; a worker process leaves that to its parent."""
    _problems.append(_sentence(place, error))
    if debugging():
        traceback.print_exception(error)
    if multiprocessing.parent_process() is None:
        warnings.warn(_problems[-1], PluginWarning, stacklevel=2)
