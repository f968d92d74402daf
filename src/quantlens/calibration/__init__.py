"""Calibration: the images, observers of tensors, range rules, and the pass that shows a method every tensor."""

from quantlens import _moved
from quantlens.calibration.cache import MEMORY, ActivationStore, StoredTensor, held_memory
from quantlens.calibration.gradients import sample_products
from quantlens.calibration.images import CHUNK, Calibration, images_together
from quantlens.calibration.measured_transforms import read_as_pixels, split_outlier_channels, subtract_means
from quantlens.calibration.passes import (
    CalibrationPass,
    EdgeView,
    Observation,
    ObservationCache,
    Observer,
    Replacement,
    as_rows,
)
from quantlens.calibration.ranges.rules import (
    REPQ_QUANTILES,
    affine,
    block_scaled,
    clipping,
    closest,
    group_affine,
    log_by_quantile,
    minmax,
    mse,
    power_of_two_factors,
    quantile_mse,
    symmetric,
    token_weights,
)
from quantlens.calibration.sampling import Product, ProductSampler, check_finite, patches

__all__ = [
    "CHUNK",
    "MEMORY",
    "REPQ_QUANTILES",
    "ActivationStore",
    "Calibration",
    "CalibrationPass",
    "EdgeView",
    "Observation",
    "ObservationCache",
    "Observer",
    "Product",
    "ProductSampler",
    "Replacement",
    "StoredTensor",
    "affine",
    "as_rows",
    "block_scaled",
    "check_finite",
    "clipping",
    "closest",
    "group_affine",
    "held_memory",
    "images_together",
    "log_by_quantile",
    "minmax",
    "mse",
    "patches",
    "power_of_two_factors",
    "quantile_mse",
    "read_as_pixels",
    "sample_products",
    "split_outlier_channels",
    "subtract_means",
    "symmetric",
    "token_weights",
]


__getattr__ = _moved.finder(__name__)
