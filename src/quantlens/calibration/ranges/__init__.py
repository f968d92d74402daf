"""Range rules: how statistics of a tensor become a scale and a zero point. Pure functions."""

from quantlens.calibration.ranges.rules import (
    affine,
    block_scaled,
    clipping,
    group_affine,
    log_by_quantile,
    minmax,
    mse,
    percentile,
    quantile_mse,
    symmetric,
)

__all__ = [
    "affine",
    "block_scaled",
    "clipping",
    "group_affine",
    "log_by_quantile",
    "minmax",
    "mse",
    "percentile",
    "quantile_mse",
    "symmetric",
]
