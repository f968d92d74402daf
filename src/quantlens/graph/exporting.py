"""A model called as in an example, and what ``torch.export`` makes of it."""

import builtins
import io
import itertools
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree

from quantlens.errors import CaptureError
from quantlens.graph.graph import Graph
from quantlens.graph.structure import (
    Placed,
    Structure,
    bound,
    describe,
    opened,
    parameters_of,
    paths_of,
    primary_of,
)

MOST = 1024
"""Images of a batch, as an export is told: torch chooses some CUDA kernels by whether a batch, or its windows, are more
than 65535 (BatchNorm's), and a graph of both cases it refuses. A graph runs any number of images."""


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments, of an image tensor, a dictionary, a tuple of arguments or (arguments, keyword
    arguments)."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if not isinstance(inputs, tuple | list):
        return (inputs,), {}
    if len(inputs) == 2 and isinstance(inputs[0], tuple | list) and isinstance(inputs[1], Mapping):
        return tuple(inputs[0]), dict(inputs[1])
    return tuple(inputs), {}


class Call(nn.Module):
    """A model called as in an example: a module that takes the example's tensors and returns a tuple of tensors, with
    the structure of both."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        super().__init__()
        self.model = model
        leaves, self._spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        numbers = itertools.count()
        self._leaves = [Placed(next(numbers)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._arguments = parameters_of(model.forward)
        try:
            given = bound(self._arguments, *pytree.tree_unflatten(self._leaves, self._spec))
        except TypeError as error:
            raise CaptureError(f"{type(model).__name__} cannot be called with the example inputs: {error}") from error
        self._takes = {name: describe(value) for name, value in given.items()}
        self.names = paths_of({"dict": list(self._takes.items())})
        self.image = images_among(tensors, self.names)
        self._example = _batch_of_two(tensors, self.image)
        self._returned = SimpleNamespace()  # an export sets a module's attributes back to what they were

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves = [tensors[leaf.number] if isinstance(leaf, Placed) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        if torch.compiler.is_dynamo_compiling():  # a second time
            found = pytree.tree_leaves(opened(self.model(*args, **kwargs)))
            return tuple(leaf for leaf in found if isinstance(leaf, Tensor))
        leaves, self._returned.spec = pytree.tree_flatten(opened(self.model(*args, **kwargs)))
        numbers = itertools.count()
        self._returned.leaves = [Placed(next(numbers)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def exported(self) -> Any:
        """The model as a program of ATen operations, its batch size a symbol. What makes a number of that size is only
        understood where torch reads the code itself, which is slower (strict)."""
        self._expected = self._alone()  # before: what the model keeps of its first call must hold values
        with evaluating(self.model), _masks_as_given(), redirect_stderr(io.StringIO()):  # torch prints what it has
            try:
                with _lengths_as_symbols(self.model):
                    return self._exported(strict=False)
            except Exception as error:
                if not one_batch_size(error):
                    raise
            with torch.compiler.set_stance("default"), _silent("torch._guards", "torch._dynamo"):
                return self._exported(strict=True)

    def gives(self) -> Any:
        """The description of what the model returns, known once it is exported. Raises CaptureError where that holds no
        tensor, or what is not understood."""
        leaves, spec = self._returned.leaves, self._returned.spec
        gives = describe(pytree.tree_unflatten(leaves, spec))
        if not any(isinstance(leaf, Placed) for leaf in leaves):
            raise CaptureError(f"{type(self.model).__name__} returns no tensor")
        return gives

    def structure(self, shapes: Mapping[int, Sequence[Any]]) -> Structure:
        """What the model takes and returns. shapes: of the tensors that it returns."""
        gives = self.gives()
        if all(len(shape) == 0 for shape in shapes.values()):
            raise CaptureError(
                f"{type(self.model).__name__} returns one number for all images together, such as a loss"
            )
        return Structure(
            self._arguments,
            self._takes,
            gives,
            self.image,
            primary_of(gives, shapes),
            example=tuple(x for x, _ in self._example),
            spec=(self._returned.spec, self._returned.leaves),
        )

    def same_alone(self, graph: Graph) -> bool:
        """Whether the graph, which is of several images, also does what the model does with a single one."""
        if self._expected is None:  # it takes several only
            return True
        with torch.no_grad():
            found = graph.module()(*self._one())
        found = found if isinstance(found, tuple | list) else (found,)
        return all(a.shape == b.shape and _about_equal(a, b) for a, b in zip(self._expected, found, strict=True))

    def _one(self) -> list[Tensor]:
        """The example with a single image, which is not all one value."""
        tensors = [x[:1] if batched else x for x, batched in self._example]
        image = tensors[self.image]
        if not image.any():
            shades = torch.linspace(-1, 1, image.numel(), device=image.device)
            tensors[self.image] = shades.reshape(image.shape).to(image.dtype)
        return tensors

    def _alone(self) -> tuple[Tensor, ...] | None:
        """What the model gives for a single image; None where it does not take one."""
        buffers = {f"model.{name}": value.clone() for name, value in self.model.named_buffers()}
        try:
            with evaluating(self.model):
                return torch.func.functional_call(self, buffers, (tuple(x.clone() for x in self._one()),))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None

    def _exported(self, *, strict: bool) -> Any:
        batch = torch.export.Dim("batch", min=1, max=MOST)
        shapes = {"tensors": tuple({0: batch} if batched else None for _, batched in self._example)}
        example = tuple(x for x, _ in self._example)
        program = torch.export.export(self, (example,), dynamic_shapes=shapes, strict=strict)
        return program.run_decompositions({})


def _about_equal(a: Tensor, b: Tensor) -> bool:
    """Whether the values of two tensors are the same to half precision; of counts and indices this is not asked."""
    if not a.is_floating_point() or a.numel() == 0:
        return True
    largest = float(a.double().nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(a.double(), b.double(), 0.02, 0.02 * largest, equal_nan=True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, a model is in evaluation mode, without gradients, and nothing of it is compiled; afterwards every part of
    it is in the mode that it was in."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _lengths_as_symbols(model: nn.Module) -> Iterator[None]:
    """Inside, ``len(x)`` in the code of a model's parts is ``x.shape[0]`` of a tensor, which stays a symbol: Python
    makes a number of what ``len`` gives."""
    names = {type(part).__module__ for part in model.modules()}
    places = [vars(sys.modules[name]) for name in names if name in sys.modules and not name.startswith("torch.")]
    places = [place for place in places if "len" not in place]
    try:
        for place in places:
            place["len"] = lambda x: x.shape[0] if isinstance(x, Tensor) and x.dim() else builtins.len(x)
        yield
    finally:
        for place in places:
            del place["len"]


@contextmanager
def _masks_as_given() -> Iterator[None]:
    """torch's own transformers look whether a mask is causal, which no export can tell; it is applied either way."""
    looks = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda *_: False
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = looks


def one_batch_size(error: Exception) -> bool:
    """Whether an export failed since a number was made of the batch size."""
    return str(error).strip().startswith("Constraints violated")


@contextmanager
def _silent(*loggers: str) -> Iterator[None]:
    """What is said by an exception is not logged too."""
    levels = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def images_among(tensors: Sequence[Tensor], names: Mapping[int, str]) -> int:
    """Which of the inputs are the images: ``pixel_values``, else the first [B, C, H, W], else the first in float."""
    if not tensors:
        raise CaptureError("the example inputs hold no tensor: give images [B, 3, H, W]")
    floats = [n for n, x in enumerate(tensors) if x.is_floating_point()] or [0]
    named = [n for n in floats if names[n] == "pixel_values"]
    return next(iter([*named, *(n for n in floats if tensors[n].dim() == 4), *floats]))


def _batch_of_two(tensors: Sequence[Tensor], image: int) -> list[tuple[Tensor, bool]]:
    """Two images of an example (one: twice), and of what else has a value for each of them; with whether it has."""
    if tensors[image].dim() == 0 or len(tensors[image]) == 0:
        raise CaptureError("the example inputs hold no image")
    count, made = len(tensors[image]), []
    for x in tensors:
        batched = x.dim() > 0 and len(x) == count
        if batched:
            x = x[:2] if count >= 2 else x.expand(2, *x.shape[1:])
        made.append((x.detach().clone(memory_format=torch.contiguous_format), batched))
    return made
