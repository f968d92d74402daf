"""Exact graph rewrites: the function of the model stays as it is (to float rounding). Transforms by name say in words
what they did."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from quantlens.graph import Graph
from quantlens.plugins import Registry
from quantlens.transforms.heads import (
    ScorePair,
    ValuePair,
    find_score_pairs,
    find_value_pairs,
    rescale_values,
    rotate_scores,
    rotate_values,
    scale_queries,
)
from quantlens.transforms.layers import (
    alone,
    ensure_bias,
    fold_layer_scale,
    hidden_source,
    permute_hidden,
    rescale_input,
    split_linear,
)
from quantlens.transforms.norms import (
    Factors,
    NormGroup,
    balance,
    columns,
    equalise_norms,
    find_norm_groups,
    fold_norm,
    keeps_channels_last,
    rescale_norm,
    smooth_factors,
)

__all__ = [
    "Factors",
    "NormGroup",
    "ScorePair",
    "Transform",
    "ValuePair",
    "alone",
    "available",
    "balance",
    "columns",
    "ensure_bias",
    "equalise_norms",
    "find_norm_groups",
    "find_score_pairs",
    "find_value_pairs",
    "fold_layer_scale",
    "fold_norm",
    "get",
    "hidden_source",
    "keeps_channels_last",
    "permute_hidden",
    "register",
    "rescale_input",
    "rescale_norm",
    "rescale_values",
    "rotate_scores",
    "rotate_values",
    "scale_queries",
    "smooth_factors",
    "split_linear",
]

Transform = Callable[[Graph], list[str]]
"""Changes a graph in place and leaves its function as it is; returns a sentence for each thing it did (none: []), as
they stand in `Plan.rewrites`."""


def register(name: str) -> Callable[[Transform], Transform]:
    """Decorator that adds a transform. Raises QuantlensError for a name that is taken."""

    def add(transform: Transform) -> Transform:
        _TRANSFORMS.add(transform, name)
        return transform

    return add


def available() -> dict[str, Transform]:
    """All transforms by name, in alphabetical order."""
    return dict(sorted(_TRANSFORMS.all().items()))


def get(name: str) -> Transform:
    """A transform by name. Raises UnknownNameError."""
    return _TRANSFORMS.get(name)


def _adopt(name: str, found: Any) -> None:
    """Register a function that an entry point names."""
    if name and not isinstance(found, ModuleType):
        register(name)(found)


_TRANSFORMS: Registry[Transform] = Registry("transform", "quantlens.transforms", adopt=_adopt)
