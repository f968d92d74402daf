"""What the file of a detector gives."""

from collections.abc import Mapping
from typing import Any

import torch

from quantlens.errors import UnsupportedError
from quantlens.export.onnx_graph import Emitter
from quantlens.export.onnx_values import Size
from quantlens.models.detection import scores_and_boxes
from quantlens.qmodel import QuantizedModel


def write_detections(e: Emitter, qmodel: QuantizedModel, given: Mapping[Any, str]) -> list[Any]:
    """Write ``logits`` [batch, Q, C], ``boxes`` [batch, Q, 4] (centre x, y, width, height in fractions of the input)
    and ``scores`` [batch, Q, classes], probabilities; what else the module returns is left out, with all that it alone
    needs. given: outputs of the graph -> their values. Returns what the file says of each."""
    outputs, head = qmodel.graph.outputs, qmodel.detection_head
    like = [torch.empty([1 if isinstance(n, Size) else n for n in e.sizes(node)], device="meta") for node in outputs]
    found = scores_and_boxes(qmodel.graph.structure.result(like))
    if found is None or head is None:
        raise UnsupportedError(f"{qmodel.name} gives no class logits [B, Q, C] and boxes [B, Q, 4]")
    logits, boxes = (next(node for node, value in zip(outputs, like, strict=True) if value is part) for part in found)
    sizes, softmax = e.sizes(logits), head.scoring == "softmax"
    read = e.op("Identity", given[logits], out="logits")
    e.op("Identity", given[boxes], out="boxes")
    if softmax:  # without "no object", the last
        e.op("Slice", e.op("Softmax", read, axis=-1), [0], [-1], [2], out="scores")
    else:
        e.op("Sigmoid", read, out="scores")
    shapes = {"logits": sizes, "boxes": e.sizes(boxes), "scores": (*sizes[:2], sizes[2] - softmax)}
    e.keep(shapes)
    return [e.info(name, "float", shape) for name, shape in shapes.items()]
