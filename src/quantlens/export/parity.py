"""What was shipped against what was measured."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from quantlens.ambient import isolated
from quantlens.boxes import Boxes, Detections
from quantlens.calibration import Calibration
from quantlens.export.exported import Artefact
from quantlens.metrics.detection import CONFIDENT, box_drift, coco_metrics, overall
from quantlens.metrics.divergence import sqnr_db
from quantlens.models.detection import postprocess
from quantlens.qmodel import Outputs, float_model


class Parity(NamedTuple):
    """Differences of the logits of n images. worst, mean: largest and mean absolute difference. sqnr_db: signal over
    difference, dB. agreement: share of equal predictions; of a detector, of the simulation's confident boxes that the
    file gives. matched_iou: mean IoU of these. map: COCO's mAP of the file's boxes, where the simulation's confident
    ones count as the truth. None where there are none."""

    n: int
    worst: float
    mean: float
    sqnr_db: float
    agreement: float | None
    matched_iou: float | None = None
    map: float | None = None

    def sentence(self, runtime: str) -> str:
        if self.matched_iou is not None and self.agreement is not None:
            same = f"{100 * self.agreement:.1f} % of the boxes matched (mean IoU {self.matched_iou:.4f}"
            same += ")" if self.map is None else f", mAP {100 * self.map:.1f})"
        else:
            same = "no confident box" if self.agreement is None else f"{100 * self.agreement:.1f} % equal predictions"
        return (
            f"{runtime} against the simulation on {self.n} images: {same}, "
            f"logits differ by {self.mean:.4f} on average and {self.worst:.4f} at most (SQNR {self.sqnr_db:.1f} dB)"
        )


@isolated
def parity(
    model: Any, artefact: Artefact, images: Any, *, progress: Callable[[int, int], None] | None = None
) -> Parity:
    """Run both on the same images (a SOURCE, an image set or a tensor). Raises QuantlensError for no images."""
    qmodel = float_model(model)
    runs: list[tuple[Outputs, Outputs]] = []
    batches, done = Calibration.of(images, qmodel.preprocess, device=qmodel.device), 0
    with torch.inference_mode():
        for batch in batches:
            runs.append((qmodel.outputs(batch), artefact.outputs(batch)))
            done += len(batch)
            if progress is not None:
                progress(done, len(batches))
    a, b = (np.concatenate([run.logits.cpu().double().numpy() for run in side]) for side in zip(*runs, strict=True))
    difference = np.abs(a - b)
    sqnr = sqnr_db(float((a**2).sum()), float((difference**2).sum()))
    found = (len(a), float(difference.max()), float(difference.mean()), float("inf") if sqnr is None else sqnr)
    if qmodel.task == "detect":
        return Parity(*found, *_same_boxes(qmodel, runs))
    return Parity(*found, float((a.argmax(1) == b.argmax(1)).mean()))


def _same_boxes(qmodel: Any, runs: list[tuple[Outputs, Outputs]]) -> tuple[float | None, float | None, float | None]:
    """(share of the simulation's confident boxes that the file gives, their mean IoU, mAP)."""
    head, counts = qmodel.detection_head, [len(run[0].logits) for run in runs]
    expected, given = (
        Detections.joined(
            [
                postprocess(run.logits, run.boxes, [head.input_size] * count, head, first=first)
                for run, count, first in zip(side, counts, np.cumsum([0, *counts]), strict=False)
            ]
        )
        for side in zip(*runs, strict=True)
    )
    truth = expected.take(expected.scores > CONFIDENT)
    if not len(truth):
        return None, None, None
    drift = {name: overall(ratio) for name, ratio in box_drift(given, expected, sum(counts)).items()}
    known = Boxes(truth.image, truth.boxes, truth.labels)
    lost = drift["lost"]
    return None if lost is None else 1 - lost, drift["matched_iou"], coco_metrics(given, known, sum(counts))["map"]
