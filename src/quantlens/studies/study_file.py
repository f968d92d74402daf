"""Reading a study file: YAML with safe tags only, a mistake in it as one sentence, and the paths that stand in it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from quantlens.errors import QuantlensError

MAX_BYTES = 1 << 20
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}")


def read_yaml(path: Path, where: str) -> Any:
    """What a YAML file holds. Raises QuantlensError for one that cannot be read or is none; `where` names it there."""
    import yaml

    try:
        size = path.stat().st_size
        if path.is_dir():
            raise QuantlensError(f"{where} is a directory; give the YAML file itself")
        if size > MAX_BYTES:
            raise QuantlensError(f"{where} has {size} bytes, more than a study can have; is it the right file?")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise QuantlensError(f"{where} does not exist; see examples/ for files to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise QuantlensError(f"{where} cannot be read ({error})") from error
    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}" if mark is not None else ""
        raise QuantlensError(f"{where} is not valid YAML{at}: {getattr(error, 'problem', None) or error}") from error


def _loader() -> Any:
    """yaml.SafeLoader that refuses a key given twice (YAML would silently keep the last)."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, str) and key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice", key_node.start_mark
                    )
                if isinstance(key, str):
                    seen.add(key)
            return super().construct_mapping(node, deep)

    return Loader


# ---- errors ----------------------------------------------------------------------------------------------------------


def first_problem(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake in a study file as a sentence; `root` is the model of the whole file."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    # A misspelt key is most likely the reason of a missing one.
    problems.sort(key=lambda p: p["type"] != "extra_forbidden")
    problem = problems[0]
    location = tuple(problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys_at(location[:-1], root)
        close = get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        place = f" in `{_spell(location[:-1])}`" if len(location) > 1 else ""
        hint = f"; did you mean {close[0]!r}?" if close else f"; the keys are {', '.join(known)}"
        return f"unknown key {str(location[-1])!r}{place}{hint}"
    if problem["type"] == "missing":
        return f"the key `{_spell(location)}` is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not location:
        return message
    message = message[0].lower() + message[1:] if message[:5] == "Input" else message
    return f"`{_spell(location)}`: {message}"


def _spell(location: tuple[Any, ...]) -> str:
    """("models", 0, "name") -> models[0].name"""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def _keys_at(location: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    """The keys that may stand at a place of the study file."""
    here: Any = root
    for part in location:
        if isinstance(here, type) and issubclass(here, BaseModel):
            here = here.model_fields[str(part)].annotation if str(part) in here.model_fields else None
        else:  # an index of a list, a name in a mapping
            here = _model_in(here)
    found = _model_in(here)
    return [] if found is None else list(found.model_fields)


def _model_in(annotation: Any) -> Any:
    """The pydantic model inside `tuple[Model, ...]`, `dict[str, Model]` or `Model | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, get_args(annotation)) if m is not None), None)


# ---- paths -----------------------------------------------------------------------------------------------------------


def expand(text: str, where: str, environment: Mapping[str, str] | None = None) -> str:
    """Replace `${NAME}` and `${NAME:-default}`; a variable that is not set is an error."""
    values = os.environ if environment is None else environment

    def value(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if values.get(name):
            return values[name]
        if default is not None:
            return default
        raise QuantlensError(f"{where} uses ${{{name}}}, which is not set; run `export {name}=…` first")

    return _VARIABLE.sub(value, text)


def resolve_source(spec: str, base: Path, where: str) -> str:
    """A SOURCE with variables replaced and a relative path made absolute; `embedded:` names stay as they are."""
    spec = expand(spec, where)
    kind, colon, rest = spec.partition(":")
    if not colon or kind == "embedded":
        return spec
    return f"{kind}:{base / Path(rest).expanduser()}"


def resolve_path(text: str, base: Path, where: str) -> str:
    """A file path with variables replaced, relative to `base`."""
    return str(base / Path(expand(text, where)).expanduser())
