"""What the file of a detector gives."""

from collections.abc import Mapping
from typing import Any

from quantlens.errors import UnsupportedError
from quantlens.export.onnx_graph import Emitter
from quantlens.qmodel import QuantizedModel


def measured_outputs(qmodel: QuantizedModel) -> tuple[int, int]:
    """The places of a detector's class logits and boxes among its graph's outputs."""
    graph = qmodel.graph
    if graph.boxes is None or qmodel.detection_head is None:
        raise UnsupportedError(f"{qmodel.name} gives no class logits [B, Q, C] and boxes [B, Q, 4]")
    return graph.outputs.index(graph.output), graph.outputs.index(graph.boxes)


def write_detections(e: Emitter, qmodel: QuantizedModel, given: Mapping[Any, str]) -> list[Any]:
    """Write ``logits`` [batch, Q, C], ``boxes`` [batch, Q, 4] (centre x, y, width, height in fractions of the input)
    and ``scores`` [batch, Q, classes], probabilities; what else the module returns is left out, with all that it alone
    needs. given: outputs of the graph -> their values. Returns what the file says of each."""
    logits, boxes = (qmodel.graph.outputs[place] for place in measured_outputs(qmodel))
    sizes, softmax = e.sizes(logits), qmodel.detection_head.scoring == "softmax"
    read = e.op("Identity", given[logits], out="logits")
    e.op("Identity", given[boxes], out="boxes")
    if softmax:  # without "no object", the last
        e.op("Slice", e.op("Softmax", read, axis=-1), [0], [-1], [2], out="scores")
    else:
        e.op("Sigmoid", read, out="scores")
    shapes = {"logits": sizes, "boxes": e.sizes(boxes), "scores": (*sizes[:2], sizes[2] - softmax)}
    e.keep(shapes)
    return [e.info(name, "float", shape) for name, shape in shapes.items()]
