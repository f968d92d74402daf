"""The public face: ``quantize`` (the rest is re-exported from the rooms)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantlens.methods import registry
from quantlens.methods.base import Progress
from quantlens.models import Model, load_model
from quantlens.quantizers import Bits, QuantizedModel


def quantize(
    model: Model | torch.nn.Module,
    calibration: Any,
    method: str = "repq-vit",
    bits: str | Bits | Mapping[str, Any] = "W8A8",
    seed: int = 0,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> QuantizedModel:
    """Quantize a float model after training.

    model: from :func:`load_model`, or an ``nn.Module`` (images [B, 3, H, W] -> logits [B, K]).
    calibration: float images [N, 3, H, W] prepared as the model wants them, an iterable of such batches, or a SOURCE;
    32 is the usual number. bits: ``W4A8``-style or ``FP32``. options: the method's own (``quantlens methods`` lists
    them).

    Returns a :class:`~quantlens.quantizers.QuantizedModel`. Raises QuantlensError subclasses on anything the caller
    can mend.
    """
    if not isinstance(model, Model):
        size = (
            tuple(calibration.shape[1:]) if isinstance(calibration, torch.Tensor) and calibration.dim() == 4 else None
        )
        model = load_model(model, input_size=size)  # type: ignore[arg-type]
    return registry.get(method).apply(model, calibration, bits, seed=seed, progress=progress, **options)
