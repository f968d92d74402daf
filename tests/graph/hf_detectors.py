"""Small detectors of Hugging Face, made from configurations, every parameter and buffer redrawn."""

from __future__ import annotations

import torch
from benchmarks.support.detectors import CONFIGURATIONS, side_of
from hf_models import redrawn
from torch import nn


def small(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """(a detector, three images for it)."""
    import transformers

    kind, settings = CONFIGURATIONS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForObjectDetection")(getattr(transformers, f"{kind}Config")(**settings))
    scales = {
        name: value.detach().clone() for name, value in model.named_parameters() if name.endswith(("scale", ".up"))
    }
    side = side_of(name)
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    model = redrawn(model, seed)
    for name, value in scales.items():  # of D-FINE: near zero they leave nothing of the image
        model.get_parameter(name).copy_(value * 1.1)
    for part in model.modules():  # no ReLU takes much of it away
        if isinstance(part, nn.Conv2d):
            part.weight *= 1.6
    return model, images
