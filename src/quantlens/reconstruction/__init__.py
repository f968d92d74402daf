"""Parts that methods optimise with, each usable alone: bias correction, rounding, scales, blocks, equalisation."""

from quantlens.reconstruction.bias import correct_biases, expected_error
from quantlens.reconstruction.blocks import optimise_scales, reconstruct
from quantlens.reconstruction.distillation import Distillation, DistillationReport, distil
from quantlens.reconstruction.equalisation import (
    Factors,
    balance,
    equalise_norms,
    smooth_factors,
)
from quantlens.reconstruction.heads import (
    ScorePair,
    ValuePair,
    find_score_pairs,
    find_value_pairs,
    rescale_values,
    rotate_scores,
    rotate_values,
)
from quantlens.reconstruction.losses import LOSSES, Context, Loss, Metric, MetricLoss, divergence, mse, token_norm
from quantlens.reconstruction.massive import find_massive, split_massive
from quantlens.reconstruction.rounding import AdaRound, annealed_beta
from quantlens.reconstruction.scales import LearnedScale
from quantlens.reconstruction.sensitivity import fisher_metrics, perturbation_metrics
from quantlens.reconstruction.settings import Report, Settings, UnitReport
from quantlens.reconstruction.units import Unit, find_units

__all__ = [
    "LOSSES",
    "AdaRound",
    "Context",
    "Distillation",
    "DistillationReport",
    "Factors",
    "LearnedScale",
    "Loss",
    "Metric",
    "MetricLoss",
    "Report",
    "ScorePair",
    "Settings",
    "Unit",
    "UnitReport",
    "ValuePair",
    "annealed_beta",
    "balance",
    "correct_biases",
    "distil",
    "divergence",
    "equalise_norms",
    "expected_error",
    "find_massive",
    "find_score_pairs",
    "find_units",
    "find_value_pairs",
    "fisher_metrics",
    "mse",
    "optimise_scales",
    "perturbation_metrics",
    "reconstruct",
    "rescale_values",
    "rotate_scores",
    "rotate_values",
    "smooth_factors",
    "split_massive",
    "token_norm",
]
