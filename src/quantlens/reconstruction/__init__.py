"""Parts that methods optimise with, each usable alone: bias correction, rounding, scales, blocks."""

from quantlens import _moved
from quantlens.reconstruction.bias import correct_biases
from quantlens.reconstruction.block_metrics import fisher_metrics, perturbation_metrics
from quantlens.reconstruction.blocks import reconstruct
from quantlens.reconstruction.mlp import Fit, find_mlps, replace_gelu
from quantlens.reconstruction.scales import AdaRound, LearnedScale, annealed_beta
from quantlens.reconstruction.settings import (
    LOSSES,
    Context,
    DetectionLoss,
    Loss,
    Metric,
    MetricLoss,
    Report,
    Settings,
    UnitReport,
    mse,
    token_norm,
)
from quantlens.reconstruction.trainer import Group, train
from quantlens.reconstruction.units import Unit, find_units

__all__ = [
    "LOSSES",
    "AdaRound",
    "Context",
    "DetectionLoss",
    "Fit",
    "Group",
    "LearnedScale",
    "Loss",
    "Metric",
    "MetricLoss",
    "Report",
    "Settings",
    "Unit",
    "UnitReport",
    "annealed_beta",
    "correct_biases",
    "find_mlps",
    "find_units",
    "fisher_metrics",
    "mse",
    "perturbation_metrics",
    "reconstruct",
    "replace_gelu",
    "token_norm",
    "train",
]


__getattr__ = _moved.finder(__name__)
