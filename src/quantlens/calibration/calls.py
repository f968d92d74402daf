"""Calibration inputs that are more than images: whole calls of the model, with all that it takes."""

import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantlens.data.given import IMAGE_KEYS, LABEL_KEYS, is_map_style
from quantlens.data.images import ImageSet
from quantlens.data.sources import Source
from quantlens.errors import QuantlensError, QuantlensWarning
from quantlens.graph import arguments_of, images_among, parameters_of

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments."""

MOST = 1024
"""Images that are read, at most."""


@dataclass(frozen=True)
class Calls:
    """images: float [N, C, H, W]. example: the first call. others: number of an input -> its values for all calls, a
    row for each image where it has one."""

    images: Tensor
    example: Call
    others: dict[int, Tensor]


def called(calibration: Any, module: nn.Module) -> Any:
    """:class:`Calls`, where ``calibration`` is a call of the module or holds several: dictionaries of its arguments, or
    (arguments, keyword arguments); anything else as it is, to be read as images. Labels are left out.

    Raises QuantlensError where calls do not fit each other, and where images are to be made (None) for a module that
    takes more than images.
    """
    names = [name for name, _ in parameters_of(module.forward)]
    if calibration is None and (more := _wanted(module)[1:]):
        raise QuantlensError(
            f"{type(module).__name__} takes {' and '.join(more)} beside images, and only images can be made; give "
            "whole calls as calibration inputs, such as dictionaries of its arguments"
        )
    if calibration is None or isinstance(calibration, str | Tensor | Source | ImageSet) or is_map_style(calibration):
        return calibration
    if _as_call(calibration, names) is not None:
        return _joined([calibration], names)
    if not isinstance(calibration, Iterable):
        return calibration
    if isinstance(calibration, list | tuple | Mapping):
        items: Any = calibration
        first = list(calibration)[:1] if not isinstance(calibration, Mapping) else []
    else:
        iterator = iter(calibration)
        first = [item for item in [next(iterator, None)] if item is not None]
        items = chain(first, iterator)
    return _joined(items, names) if first and _as_call(first[0], names) is not None else items


def _wanted(module: nn.Module) -> list[str]:
    """The arguments that a module cannot be called without."""
    taken = inspect.signature(module.forward).parameters.values()
    return [
        one.name for one in taken if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]


def _as_call(item: Any, names: list[str]) -> Call | None:
    """An item as a call, None where it is images, with labels or not."""
    pair = isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], tuple | list)
    if not isinstance(item, Mapping) and not (pair and isinstance(item[1], Mapping)):
        return None
    args, kwargs = arguments_of(item)
    kwargs = {key: value for key, value in kwargs.items() if key not in LABEL_KEYS}
    if args:
        return args, kwargs
    image = next((key for key in IMAGE_KEYS if isinstance(kwargs.get(key), Tensor)), None)
    known = {key: value for key, value in kwargs.items() if key in names or not isinstance(value, Tensor)}
    return ((), known) if image in names and kwargs[image].dim() > 3 else None


def _joined(items: Iterable[Any], names: list[str]) -> Calls:
    """All calls as one, their batches one after the other."""
    found: list[list[Any]] = []
    count, example, spec, number = 0, None, None, 0
    for item in items:
        call = _as_call(item, names)
        leaves, form = pytree.tree_flatten(call)
        if call is None or (spec is not None and form != spec):
            raise QuantlensError("the calibration inputs are not all called alike: give the same arguments every time")
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if example is None:
            example, spec, number = call, form, images_among(tensors, names_of(call))
        found.append(leaves)
        count += len(tensors[number])
        if count >= MOST:
            break
    if example is None:
        raise QuantlensError("no calibration inputs: give at least one call")
    constants = [[leaf for leaf in leaves if not isinstance(leaf, Tensor)] for leaves in found]
    if any(other != constants[0] for other in constants):
        raise QuantlensError("the calibration inputs differ in what is no tensor: give the same values every time")
    batches = [[leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves in found]
    images = torch.cat([batch[number] for batch in batches])
    others = {
        place: _all_rows([batch[place] for batch in batches], [len(batch[number]) for batch in batches])
        for place in range(len(batches[0]))
        if place != number
    }
    _tell_varying({name: others[place] for place, name in names_of(example).items() if place in others}, len(images))
    return Calls(images, example, others)


def _tell_varying(others: Mapping[str, Tensor], count: int) -> None:
    """Warn of inputs besides the images that differ between these."""
    varying = [
        name
        for name, value in others.items()
        if value.dim() and len(value) == count and not torch.equal(value, value[:1].expand_as(value))
    ]
    if varying:
        warnings.warn(
            f"{', '.join(varying)} differ from image to image: ranges are chosen with every image's own, but training, "
            "gradients, `inspect` and `allocate` run the model with the first image's",
            QuantlensWarning,
            stacklevel=2,
        )


def names_of(call: Call) -> dict[int, str]:
    """Tensor among a call's -> the keyword that it is given by, or its place."""
    leaves, _ = pytree.tree_flatten_with_path(call)
    paths = [path for path, leaf in leaves if isinstance(leaf, Tensor)]
    return {n: str(getattr(path[-1], "key", getattr(path[-1], "idx", n))) for n, path in enumerate(paths)}


def _all_rows(values: list[Tensor], counts: list[int]) -> Tensor:
    """What is given for each image, of all batches; what is not must be the same in each."""
    if all(value.dim() > 0 and len(value) == count for value, count in zip(values, counts, strict=True)):
        return torch.cat(values)
    if all(torch.equal(value, values[0]) for value in values):
        return values[0]
    raise QuantlensError("the calibration inputs hold a tensor that has no row for each image and differs between them")
