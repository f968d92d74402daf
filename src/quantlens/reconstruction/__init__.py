"""Parts that methods optimise with, each usable alone: bias correction, rounding, scales, blocks, equalisation."""

from quantlens.reconstruction.bias import correct_biases, expected_error
from quantlens.reconstruction.blocks import optimise_scales, reconstruct
from quantlens.reconstruction.equalisation import (
    Factors,
    ValuePair,
    balance,
    equalise_norms,
    find_value_pairs,
    rescale_values,
    smooth_factors,
)
from quantlens.reconstruction.losses import LOSSES, Context, Loss, mse, token_norm
from quantlens.reconstruction.massive import find_massive, split_massive
from quantlens.reconstruction.rounding import AdaRound, annealed_beta
from quantlens.reconstruction.scales import LearnedScale
from quantlens.reconstruction.settings import Report, Settings, UnitReport
from quantlens.reconstruction.units import Unit, find_units

__all__ = [
    "LOSSES",
    "AdaRound",
    "Context",
    "Factors",
    "LearnedScale",
    "Loss",
    "Report",
    "Settings",
    "Unit",
    "UnitReport",
    "ValuePair",
    "annealed_beta",
    "balance",
    "correct_biases",
    "equalise_norms",
    "expected_error",
    "find_massive",
    "find_units",
    "find_value_pairs",
    "mse",
    "optimise_scales",
    "reconstruct",
    "rescale_values",
    "smooth_factors",
    "split_massive",
    "token_norm",
]
