"""Parts that methods optimise with, each usable alone: bias correction, rounding, scales, blocks, equalisation."""

from quantlens.reconstruction.blocks import (
    LOSSES,
    Context,
    Loss,
    Report,
    Settings,
    Unit,
    UnitReport,
    find_units,
    mse,
    optimise_scales,
    reconstruct,
    token_norm,
)
from quantlens.reconstruction.equalisation import (
    Factors,
    ValuePair,
    balance,
    equalise_norms,
    find_value_pairs,
    rescale_values,
    smooth_factors,
)
from quantlens.reconstruction.rounding import AdaRound, annealed_beta
from quantlens.reconstruction.scales import LearnedScale

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
    "equalise_norms",
    "find_units",
    "find_value_pairs",
    "mse",
    "optimise_scales",
    "reconstruct",
    "rescale_values",
    "smooth_factors",
    "token_norm",
]
