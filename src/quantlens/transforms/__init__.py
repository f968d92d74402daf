"""Exact graph rewrites: the function of the model stays as it is (to float rounding)."""

from quantlens.transforms.equalisation import Factors, balance, equalise_norms, smooth_factors
from quantlens.transforms.heads import (
    ScorePair,
    ValuePair,
    find_score_pairs,
    find_value_pairs,
    rescale_values,
    rotate_scores,
    rotate_values,
)
from quantlens.transforms.layers import fold_layer_scale, hidden_source, permute_hidden, rescale_input, split_linear
from quantlens.transforms.norms import NormGroup, find_norm_groups, fold_norm, rescale_norm
from quantlens.transforms.registry import Transform, available, get, register

__all__ = [
    "Factors",
    "NormGroup",
    "ScorePair",
    "Transform",
    "ValuePair",
    "available",
    "balance",
    "equalise_norms",
    "find_norm_groups",
    "find_score_pairs",
    "find_value_pairs",
    "fold_layer_scale",
    "fold_norm",
    "get",
    "hidden_source",
    "permute_hidden",
    "register",
    "rescale_input",
    "rescale_norm",
    "rescale_values",
    "rotate_scores",
    "rotate_values",
    "smooth_factors",
    "split_linear",
]
