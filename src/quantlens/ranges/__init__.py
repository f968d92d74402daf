"""How a range is chosen: observers collect statistics in bounded memory, rules turn them into scales and zero
points."""

from quantlens.ranges.observers import Observation, Observer, as_rows
from quantlens.ranges.rules import (
    affine,
    block_scaled,
    clipping,
    log_by_quantile,
    minmax,
    mse,
    percentile,
    quantile_mse,
    symmetric,
)

__all__ = [
    "Observation",
    "Observer",
    "affine",
    "as_rows",
    "block_scaled",
    "clipping",
    "log_by_quantile",
    "minmax",
    "mse",
    "percentile",
    "quantile_mse",
    "symmetric",
]
