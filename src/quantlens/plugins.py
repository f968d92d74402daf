"""What a person writes outside the package: a method, a format, a score, a transform.

A plugin is a module that registers what it defines when it is imported. It is found by :func:`load_plugin` (a file, or
a module's name; `--plugin` on the command line), by the environment variable QUANTLENS_PLUGINS, or by an entry point of
an installed distribution. The last two are looked at when a :class:`Registry` is asked for a name it does not know, or
for all its names: what quantlens has itself is found without running anybody else's code.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from quantlens.errors import QuantlensError, QuantlensWarning, UnknownNameError, debugging

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUPS = ("quantlens.methods", "quantlens.formats", "quantlens.scores", "quantlens.transforms")
"""Groups of entry points. One names a module, or what is to be registered itself."""

VARIABLE = "QUANTLENS_PLUGINS"
"""Files and modules to load, separated as in PATH."""

T = TypeVar("T")


class PluginWarning(QuantlensWarning):
    """An installed plugin cannot be used; the others can."""


@dataclass(frozen=True)
class _Found:
    """A plugin that was loaded. place: what a person calls it. group, name: of its entry point, "" without one."""

    place: str
    thing: Any
    group: str = ""
    name: str = ""


_found: list[_Found] = []
_given: dict[str, str] = {}
"""What was given to :func:`load_plugin` (a file: its whole path) -> the digest of the file that was run."""
_folders: dict[str, str] = {}
"""File or folder of a plugin's code -> what a person calls it."""
_problems: dict[str, bool] = {}
"""What keeps installed plugins from being used -> whether it was told."""
_registries: list[Registry[Any]] = []
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
        own: Callable[[], object] | None = None,
        adopt: Callable[[str, Any], object] | None = None,
    ) -> None:
        assert group in GROUPS
        self.what, self.group, self.hint = what, group, hint
        self._own, self._adopt, self._adopted = own, adopt, 0
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
        return self._things[name][0] if name in self._things else None

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
        if not own:
            _tell_problems()
        return {name: thing for name, (thing, _) in self._things.items() if not own or not self.place(name)}

    def place(self, name: str) -> str:
        """The plugin that a known name comes from; "" for quantlens."""
        return _place(self._things[name][1])

    def forget(self) -> None:
        """Drop what is not quantlens' own."""
        self._things, self._adopted = {n: v for n, v in self._things.items() if not self.place(n)}, 0

    def _ready(self, installed: bool = False) -> None:
        if self._own is not None:
            own, self._own = self._own, None
            own()
        if installed:
            load_installed()
        while self._adopt is not None and self._adopted < len(_found):
            found = _found[self._adopted]
            self._adopted += 1
            registered = any(maker is found.thing for _, maker in self._things.values())
            if registered or found.group not in ("", self.group):
                continue
            try:
                self._adopt(found.name, found.thing)
            except QuantlensError as error:
                if not found.group:
                    raise QuantlensError(_sentence(found.place, error)) from error
                _note(found.place, error)


def _address(maker: Any) -> tuple[str, str]:
    return str(getattr(maker, "__module__", "")), str(getattr(maker, "__qualname__", repr(maker)))


def _place(maker: Any) -> str:
    """What a person calls the plugin that defines a class or function; "" for quantlens."""
    name = _address(maker)[0]
    if name.split(".")[0] == "quantlens":
        return ""
    file = getattr(sys.modules.get(name), "__file__", None)
    return _folders.get(str(file), name)


def _spelled(maker: Any) -> str:
    return f"{_address(maker)[1]} ({_place(maker) or _address(maker)[0]})"


# ---- loading ---------------------------------------------------------------------------------------------------------


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
        module = _run(path, text) if is_file else import_module(text)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{text}.".startswith(f"{error.name}."):
            file = f", or {text}.py for the file of that name" if Path(f"{text}.py").is_file() else ""
            raise QuantlensError(f"plugin {text}: there is no such module; give one that Python finds{file}") from error
        raise QuantlensError(_sentence(text, error)) from error
    if is_file:
        return module
    _given[text] = ""
    _remember(text, module)
    return module


def load_all(given: Sequence[str] = ()) -> None:
    """Load the plugins of QUANTLENS_PLUGINS, and these."""
    for where in (*os.environ.get(VARIABLE, "").split(os.pathsep), *given):
        if where.strip():
            load_plugin(where.strip())


def load_installed() -> None:
    """Load what QUANTLENS_PLUGINS and entry points name, once. An entry point that fails is left out, and noted."""
    global _scanned
    if _scanned:
        return
    from importlib.metadata import entry_points

    load_all()
    _scanned = True
    for group in GROUPS:
        for point in sorted(entry_points(group=group), key=lambda p: p.name):
            place = _place_of(point)
            try:
                thing = point.load()
            except (Exception, SystemExit) as error:
                _note(place, error)
            else:
                _remember(place, sys.modules[point.module], thing, group, point.name)


def given() -> list[str]:
    """What was loaded by :func:`load_plugin`, so that another process can load it too."""
    return list(_given)


def forget() -> None:
    """Forget every plugin and all that was registered outside of quantlens, as in a new process."""
    global _scanned
    for registry in _registries:
        registry.forget()
    for found in _found:
        name = getattr(found.thing, "__name__" if isinstance(found.thing, ModuleType) else "__module__", "")
        sys.modules.pop(name, None)
    for state in (_found, _given, _folders, _problems):
        state.clear()  # type: ignore[attr-defined]
    _scanned = False


def _run(path: Path, place: str) -> ModuleType:
    """The module of a file, run if it has not been run as it is now."""
    from hashlib import sha256

    name = f"quantlens_plugins.{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    source = path.read_bytes()
    digest = sha256(source).hexdigest()
    if name in sys.modules and _given.get(str(path)) == digest:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    _given[str(path)], _folders[str(path)] = digest, place
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
    file = getattr(module, "__file__", None)
    if file is not None:
        _folders[str(file)] = place
        top = getattr(sys.modules.get(module.__name__.split(".")[0]), "__path__", None)
        if top is not None:  # the code of a package is all of its folder
            _folders.update(dict.fromkeys(map(str, top), place))
    _found.append(_Found(place, module if thing is None else thing, group, name))


def _place_of(point: EntryPoint) -> str:
    if point.dist is None:
        return point.value
    return f"{point.name} of {point.dist.name} {point.dist.version} ({point.value})"


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def blame(error: BaseException) -> str | None:
    """The sentence for an error that a plugin's code raised while it was used; None for any other error."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for folder, place in _folders.items():
            if frame.filename == folder or frame.filename.startswith(folder + os.sep):
                where = f"{Path(frame.filename).name}, line {frame.lineno}"
                return f"plugin {place} failed: {_cause(error)} ({where}); QUANTLENS_DEBUG=1 shows the traceback"
    return None


def _sentence(place: str, error: BaseException) -> str:
    """What keeps a plugin from being loaded: the error, and the plugin's own line that it came from."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if not _is_machinery(f.filename)]
    where = f" ({Path(own[0].filename).name}, line {own[0].lineno})" if own else ""
    return f"plugin {place} cannot be loaded: {_cause(error)}{where}; QUANTLENS_DEBUG=1 shows the traceback"


def _is_machinery(file: str) -> bool:
    return file.startswith(str(Path(__file__).parent) + os.sep) or "importlib" in file


def _cause(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, QuantlensError) else f"{type(error).__name__}: {text}"


def _note(place: str, error: BaseException) -> None:
    _problems.setdefault(_sentence(place, error), False)
    if debugging():
        traceback.print_exception(error)


def _tell_problems() -> None:
    """Warn of what keeps installed plugins from being used, once; a worker process leaves that to its parent."""
    import multiprocessing

    for sentence, told in _problems.items():
        if not told and multiprocessing.parent_process() is None:
            warnings.warn(sentence, PluginWarning, stacklevel=4)
    _problems.update(dict.fromkeys(_problems, True))
