"""Files that people write by hand (YAML): read, checked against a pydantic model, paths in them made whole.

A path is relative to the file that it stands in; `${NAME}` and `${NAME:-default}` in paths are taken from the
environment. Every mistake is one sentence that names the file and the key.
"""

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo

from quantlens.errors import QuantlensError

Checked = TypeVar("Checked", bound=BaseModel)


class Strict(BaseModel):
    """Has no keys but those declared, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# ---- paths and sources -----------------------------------------------------------------------------------------------

_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}")


def _value(match: re.Match[str]) -> str:
    """What a variable stands for."""
    found = os.environ.get(match["name"]) or match["default"]
    if found is None:
        raise ValueError(f"uses {match[0]}, which is not set; run `export {match['name']}=…` first")
    return found


def whole_path(text: str, info: ValidationInfo) -> str:
    """A path with variables replaced, relative to the directory that the validation is given (if it is)."""
    return text if info.context is None else str(info.context / Path(_VARIABLE.sub(_value, text)).expanduser())


def source_from(text: str, base: Path) -> str:
    """A SOURCE with variables replaced and its path relative to `base`; names of sets that ship or are made stay as
    they are. Raises ValueError for a variable that is not set."""
    kind, colon, rest = _VARIABLE.sub(_value, text).partition(":")
    named = not colon or kind in ("embedded", "made")
    return kind + colon + rest if named else f"{kind}:{base / Path(rest).expanduser()}"


def _whole_source(text: str, info: ValidationInfo) -> str:
    return text if info.context is None else source_from(text, info.context)


Source = Annotated[str, Field(min_length=1), AfterValidator(_whole_source)]
"""A SOURCE of images, its path relative to the directory that the validation is given (if it is)."""


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_yaml(path: Path, where: str, hint: str = "check the path") -> Any:
    """What a YAML file holds (safe tags only). where: what it is, for the errors; hint: what to do where it is not
    there. Raises QuantlensError."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise QuantlensError(f"{where} does not exist; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise QuantlensError(f"{where} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}" if mark is not None else ""
        raise QuantlensError(f"{where} is not valid YAML{at}: {getattr(error, 'problem', None) or error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice (YAML would silently keep the last)."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [(self.construct_object(key, deep=True), key.start_mark) for key, _ in node.value]
        for i, (key, mark) in enumerate(keys):
            if any(key == before for before, _ in keys[:i]):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", mark)
        return super().construct_mapping(node, deep)


def checked(model: type[Checked], data: Any, *, base: Path | None, where: str) -> Checked:
    """Plain data as `model`; paths are resolved against `base` (None: they stay as they are). Raises QuantlensError
    with the first mistake."""
    try:
        return model.model_validate(data, context=None if base is None else base.resolve())
    except ValidationError as error:
        raise QuantlensError(f"{where}: {_first_problem(error, model)}") from None


def _first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """The first mistake as a sentence."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    # A misspelt key is most likely the reason of a missing one.
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    *place, key = location = problem["loc"] or ("",)
    if problem["type"] == "extra_forbidden":
        known = _keys_at(model, place)
        close = get_close_matches(str(key), known, n=1, cutoff=0.5)
        at = f" in `{_spell(place)}`" if place else ""
        return f"unknown key {key!r}{at}; " + (
            f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}"
        )
    if problem["type"] == "missing":
        return f"the key `{_spell(location)}` is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"`{_spell(location)}`: {message.replace('Input', 'input', 1)}" if problem["loc"] else message


def _spell(location: Sequence[Any]) -> str:
    """("models", 0, "name") -> models[0].name"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _keys_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys that may stand at a place of the file."""
    here: Any = model
    for part in location:  # an index of a list and a name in a mapping lead to no other model
        if part in here.model_fields:
            here = _model_in(here.model_fields[part].annotation) or here
    return list(here.model_fields)


def _model_in(annotation: Any) -> Any:
    """The pydantic model inside `tuple[Model, ...]`, `dict[str, Model]` or `Model | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, get_args(annotation)) if m is not None), None)
