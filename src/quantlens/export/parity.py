"""Is what was shipped what was measured? An exported file held against the simulation, image by image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quantlens.ambient import isolated
from quantlens.calibration import Calibration
from quantlens.errors import QuantlensError
from quantlens.metrics.divergence import sqnr_db
from quantlens.qmodel import float_model


@dataclass(frozen=True)
class Parity:
    """Differences of the logits of n images. worst, mean: largest and mean absolute difference. sqnr_db: signal over
    difference, dB. agreement: share of equal predictions."""

    n: int
    worst: float
    mean: float
    sqnr_db: float
    agreement: float

    def sentence(self, runtime: str) -> str:
        return (
            f"{runtime} against the simulation on {self.n} images: {100 * self.agreement:.1f} % equal predictions, "
            f"logits differ by {self.mean:.4f} on average and {self.worst:.4f} at most (SQNR {self.sqnr_db:.1f} dB)"
        )


@isolated
def parity(model: Any, artefact: Any, images: Any, *, progress: Callable[[int, int], None] | None = None) -> Parity:
    """Run both on the same images (a SOURCE, an image set or a tensor). Raises QuantlensError for no images."""
    qmodel = float_model(model)
    expected, got = [], []
    batches = Calibration.of(images, qmodel.preprocess, device=qmodel.device)
    with torch.inference_mode():
        for batch in batches:
            expected.append(qmodel(batch).cpu().numpy())
            got.append(artefact.run(batch.cpu().numpy())[0])
            if progress is not None:
                progress(sum(map(len, got)), len(batches))
    if not expected:
        raise QuantlensError("no images to check the export on")
    a, b = np.concatenate(expected).astype(np.float64), np.concatenate(got).astype(np.float64)
    difference = np.abs(a - b)
    noise = float((difference**2).sum())
    sqnr = sqnr_db(float((a**2).sum()), noise)
    return Parity(
        len(a),
        float(difference.max()),
        float(difference.mean()),
        sqnr if sqnr is not None else float("inf"),
        float((a.argmax(1) == b.argmax(1)).mean()),
    )
