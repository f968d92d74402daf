"""Parts that methods optimise with, each usable alone: bias correction, rounding, scales, blocks, equalisation."""

from quantlens import _moved
from quantlens.reconstruction.bias import correct_biases, expected_error
from quantlens.reconstruction.block_metrics import fisher_metrics, perturbation_metrics
from quantlens.reconstruction.blocks import optimise_scales, reconstruct
from quantlens.reconstruction.distillation import Distillation, DistillationReport, distil
from quantlens.reconstruction.losses import LOSSES, Context, Loss, Metric, MetricLoss, divergence, mse, token_norm
from quantlens.reconstruction.rounding import AdaRound, annealed_beta
from quantlens.reconstruction.scales import LearnedScale
from quantlens.reconstruction.settings import Report, Settings, UnitReport
from quantlens.reconstruction.units import Unit, find_units

__all__ = [
    "LOSSES",
    "AdaRound",
    "Context",
    "Distillation",
    "DistillationReport",
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
    "distil",
    "divergence",
    "expected_error",
    "find_units",
    "fisher_metrics",
    "mse",
    "optimise_scales",
    "perturbation_metrics",
    "reconstruct",
    "token_norm",
]


def __getattr__(name: str) -> object:
    """Names that have moved are found where they are now, with a warning."""
    return _moved.find(__name__, name)
