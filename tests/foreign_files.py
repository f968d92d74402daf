"""ONNX files as other tools write them: the nearest-centroid classifier of `study_fakes`, spelled in many ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from study_fakes import PREPROCESS, FakeModel


def write(
    path: Path,
    *,
    layout: str = "NCHW",
    kind: str = "FLOAT",
    batch: int | str = "N",
    names: tuple[str, ...] = ("logits",),
    softmax: bool = False,
    beside: bool = False,
    external: bool = False,
    second_input: bool = False,
    model: Any = None,
) -> Path:
    """names: of the outputs, logits first, then (where there are two) the features. beside: the weights depend on the
    images that come together, as dynamic ranges do."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = model or FakeModel()
    weights = {"w": model.weight.numpy().T.copy(), "b": model.bias.numpy()}
    nodes, at = [], "x"

    def op(kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        out = out or f"t{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    if layout == "NHWC":
        at = op("Transpose", at, perm=[0, 3, 1, 2])
    if kind != "FLOAT":
        at = op("Cast", at, to=TensorProto.FLOAT)
    if kind == "UINT8":
        half = np.float32(PREPROCESS.mean[0])  # and so is the deviation
        weights |= {"full": np.float32(255), "mean": half, "std": half}
        at = op("Div", op("Sub", op("Div", at, "full"), "mean"), "std")
    pooled = op("AveragePool", op("ReduceMean", at, axes=[1]), kernel_shape=[4, 4], strides=[4, 4])
    features = op("Flatten", pooled, out=names[1] if len(names) > 1 else "inner")
    logits = op("Gemm", features, "w", "b")
    if beside:
        logits = op("Mul", logits, op("ReduceMax", features))
    if second_input:
        logits = op("Add", logits, "y")
    op("Softmax" if softmax else "Identity", logits, out=names[0])

    def value(name: str, shape: list[Any], kind: str = "FLOAT") -> Any:
        return helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape)

    shape = [batch, 32, 32, 3] if layout == "NHWC" else [batch, 3, 32, 32]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", shape, kind), *([value("y", [1])] if second_input else [])],
        [value(name, [batch, size]) for name, size in zip(names, (8, 64), strict=False)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    if external:
        onnx.save_model(proto, str(path), save_as_external_data=True, location=f"{path.stem}.data", size_threshold=0)
    else:
        onnx.save_model(proto, str(path))
    return path
