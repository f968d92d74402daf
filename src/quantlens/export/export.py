"""A quantized model as a file that runtimes run: ONNX, OpenVINO IR. What is written are the quantizers that were
measured: their codes, scales and zero points.

The file carries what an application needs besides: preprocessing, class names, the plan's record (method, bits, seed,
calibration, checkpoint), and a guard: an out-of-distribution score as second output, with the threshold that keeps a
given share of in-distribution images.
"""

import functools
import json
import os
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantlens._version import __version__
from quantlens.ambient import isolated
from quantlens.calibration import Calibration
from quantlens.errors import QuantlensError, StorageError, UnknownNameError, UnsupportedError
from quantlens.export.onnx_file import Initializer, check, pieces
from quantlens.files import write_whole
from quantlens.metrics.ood_scores import energy, maxlogit, msp
from quantlens.qmodel import QuantizedModel, float_model

GUARDS = {"msp": msp, "energy": energy, "maxlogit": maxlogit}
"""Scores that a file can carry; larger means more in-distribution."""

KEEP = 0.95
"""Share of in-distribution images that the threshold keeps."""


@isolated
def export(
    model: Any,
    path: str | Path,
    *,
    simulate: bool = False,
    guard: str = "energy",
    guard_images: Any = None,
    keep: float = KEEP,
) -> Path:
    """Write a model for a runtime; the ending chooses: ``.onnx`` (operator set 21), ``.xml`` (OpenVINO IR, weights in
    the ``.bin`` beside it) or ``.pt2`` (PyTorch's own; logits alone, see :mod:`quantlens.export.pt2`).

    Inputs: ``images`` float32 [batch, 3, H, W], normalised. Outputs: ``logits`` [batch, K] and ``score`` [batch].

    model: quantized or float. simulate: write formats without integer kernels as float operations that reproduce them.
    guard: the score, one of :data:`GUARDS`. guard_images: in-distribution images (a SOURCE, an image set, a tensor)
    whose scores give the threshold that keeps the share ``keep`` of them; without them there is no threshold.
    Raises UnsupportedError for formats that the file cannot hold, StorageError where it cannot be written.
    """
    path = Path(path)
    qmodel: QuantizedModel = float_model(model)
    if guard not in GUARDS:
        raise UnknownNameError("guard score", guard, GUARDS)
    if not 0 < keep < 1:
        raise QuantlensError(f"keep={keep}: give the share of in-distribution images to keep, such as 0.95")
    if path.suffix == ".pt2":
        from quantlens.export.pt2 import export_pt2

        return export_pt2(qmodel, path, simulate=simulate)
    if path.suffix not in (".onnx", ".xml"):
        raise UnsupportedError(f"{path}: give a file that ends in .onnx or .xml (OpenVINO) or .pt2 (PyTorch)")
    threshold = None if guard_images is None else guard_threshold(qmodel, guard_images, guard, keep)
    record = {  # what the file says of itself
        "quantlens": __version__,
        "plan": json.dumps({**qmodel.plan.info, "rewrites": qmodel.plan.rewrites}),
        "preprocess": json.dumps(qmodel.preprocess.to_dict()),
        "guard": json.dumps({"score": guard, "keep": keep, "threshold": threshold}),
        "num_parameters": str(qmodel.num_parameters),
        "saturating": json.dumps(any(quantizer.bits > 7 for _, quantizer in qmodel.weight_edges())),
    }
    proto, initializers = onnx_model(qmodel, record, guard, simulate=simulate)
    if path.suffix == ".onnx":
        return write_whole(path, pieces(proto, initializers))
    return _openvino(proto, initializers, record, path)


def onnx_model(
    qmodel: QuantizedModel, record: dict[str, str], guard: str, *, simulate: bool
) -> tuple[Any, list[Initializer]]:
    """The checked ONNX ModelProto without its initializers, and these."""
    _need("onnx")
    from onnx import TensorProto, helper

    from quantlens.export.onnx_graph import IR_VERSION, OPSET, Emitter
    from quantlens.export.onnx_operations import write_graph

    if qmodel.plan.operators:
        raise UnsupportedError(
            f"the model computes {len(qmodel.plan.operators)} LayerNorms or softmaxes in integer arithmetic of its "
            "own, which runtimes have no operators for; quantize for a runtime (--target) to export"
        )
    emitter = Emitter(qmodel.graph, qmodel.plan.quantizers, simulate=simulate)
    logits = emitter.op("Identity", write_graph(emitter), out="logits")
    if guard == "energy":
        emitter.op("ReduceLogSumExp", logits, [1], out="score", keepdims=0)
    else:
        scored = emitter.op("Softmax", logits, axis=1) if guard == "msp" else logits
        emitter.op("ReduceMax", scored, [1], out="score", keepdims=0)

    def floats(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])

    inputs = [floats("images", *map(int, qmodel.preprocess.input_size))]
    outputs = [floats("logits", qmodel.num_classes), floats("score")]
    proto = helper.make_model(
        helper.make_graph(emitter.nodes, qmodel.name, inputs, outputs),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="quantlens",
        producer_version=__version__,
    )
    helper.set_model_props(proto, record)
    initializers = list(emitter.constants.values())
    check(proto, initializers)
    return proto, initializers


def _openvino(proto: Any, initializers: list[Initializer], record: dict[str, str], path: Path) -> Path:
    openvino = _need("openvino")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            source = Path(folder) / "model.onnx"
            write_whole(source, pieces(proto, initializers))
            model = openvino_core().read_model(source)
            for key, value in record.items():
                model.set_rt_info(value, ["quantlens", key])
            openvino.save_model(model, Path(folder) / path.name, compress_to_fp16=False)
            os.replace(Path(folder) / path.with_suffix(".bin").name, path.with_suffix(".bin"))
            os.replace(Path(folder) / path.name, path)
    except (OSError, RuntimeError) as error:
        raise StorageError(f"cannot write {path}: {error}; free some room or choose another place") from error
    return path


@functools.cache
def openvino_core() -> Any:
    """The one core of OpenVINO in a process. Each gives the main thread a stack for signals and takes it back when it
    ends; of two that end as they began, one leaves a freed one behind, and the next Ctrl-C is a segmentation fault."""
    return _need("openvino").Core()


def _need(package: str) -> Any:
    """A package of the ``deploy`` extra. Raises QuantlensError saying how to get it."""
    try:
        return import_module(package)
    except ImportError:
        raise QuantlensError(
            f"the package {package} is not installed: pip install 'quantlens[deploy]' (with the project's constraints)"
        ) from None


# ---- the guard: how its threshold is chosen, and how often it is right -----------------------------------------------


def guard_threshold(qmodel: QuantizedModel, images: Any, guard: str, keep: float = KEEP) -> dict[str, Any]:
    """{"value", "n"}: the score that at least the share ``keep`` of the in-distribution images reaches."""
    found = []
    with torch.inference_mode():
        for batch in Calibration.of(images, qmodel.preprocess, device=qmodel.device):
            found.append(GUARDS[guard](qmodel.outputs(batch).logits.cpu().numpy()))
    scores = np.concatenate(found)
    return {"value": _threshold(scores, keep), "n": len(scores)}


def _threshold(scores: np.ndarray, keep: float) -> float:
    """The largest of the scores [n] that at least the share ``keep`` of them reaches."""
    return float(np.sort(scores)[min(int(len(scores) * (1 - keep)), len(scores) - 1)])


def looks_unknown(guard: Mapping[str, Any] | None, logits: np.ndarray) -> np.ndarray | None:
    """Which images [n] a file's guard calls unknown, from its logits [n, K]; None without a threshold.

    guard: ``{"score", "keep", "threshold": {"value", "n"} or None}``, as the file's metadata holds it.
    """
    threshold = (guard or {}).get("threshold")
    if guard is None or not threshold:
        return None
    return GUARDS[guard["score"]](logits) < float(threshold["value"])


def guard_metrics(
    guard: Mapping[str, Any] | None, known: np.ndarray | None, others: Mapping[str, np.ndarray | None]
) -> dict[str, Any] | None:
    """How often a guard is right on images that it was not set on; None for a guard without a threshold.

    known: :func:`looks_unknown` of the in-distribution images; others: that of every OOD set.
    Returns the guard itself with ``"id": {"n", "kept"}`` (share of ID images that look known) and for every OOD set
    ``{"n", "flagged", "balanced_accuracy"}`` (share that looks unknown; mean of kept and flagged).
    """
    if guard is None or known is None:
        return None
    kept = float((~known).mean())
    sets: dict[str, Any] = {}
    for name, unknown in others.items():
        if unknown is not None:
            flagged = float(unknown.mean())
            sets[name] = {"n": len(unknown), "flagged": flagged, "balanced_accuracy": (kept + flagged) / 2}
    return {**guard, "id": {"n": len(known), "kept": kept}, "ood": sets}
