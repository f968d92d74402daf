"""A quantized model as a .pt2 file: ``torch.export`` with PyTorch's own quantize and dequantize operators, loadable
without quantlens:

    import torch, torch.ao.quantization.fx._decomposed       # registers the operators
    model = torch.export.load("model.pt2").module()
    logits = model(images)

It gives what the module gives; of a detector a dictionary of ``logits``, ``boxes`` and ``scores``. Weights are stored
as their integer codes (8 bits each, also where the codes are narrower). Formats that the standard operators do not know
become float operations of the same values.
"""

import io
import json
import logging
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from quantlens.ambient import isolation
from quantlens.errors import BadWeightsError, UnsupportedError
from quantlens.export.detectors import measured_outputs
from quantlens.export.exported import AS_FLOAT, Opened, Port
from quantlens.export.guards import Gaussians, add_score
from quantlens.export.onnx_codes import is_integer
from quantlens.export.runtimes import refused
from quantlens.files import write_whole
from quantlens.formats import Uniform
from quantlens.qmodel import QuantizedModel
from quantlens.qmodel.model import pooled
from quantlens.qmodel.simulation import simulate as simulation

STANDARD = frozenset((bits, signed) for bits in range(1, 9) for signed in (True, False))
"""Widths and signs of codes that the operators know."""

RECORD = "quantlens.json"
"""What the file says of itself, beside the program (``torch.export.load(path, extra_files=…)``)."""

DAMAGED = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    EOFError,
)
"""What reading a damaged file raises."""


def pt2_program(
    qmodel: QuantizedModel, *, simulate: bool, gaussians: Gaussians | None = None
) -> torch.export.ExportedProgram:
    """The program of a .pt2 file. simulate: allow formats without standard operators, as float operations. gaussians:
    their Mahalanobis score becomes one more output.

    Raises UnsupportedError for such formats otherwise.
    """
    import torch.ao.quantization.fx._decomposed

    module = _standard(qmodel, simulate, gaussians)
    batch = torch.export.Dim("batch", min=1, max=4096)
    given, dynamic = [], []
    for node in qmodel.graph.inputs:
        shape, dtype = node.meta["shape"], node.meta.get("dtype") or torch.float32
        given.append(torch.zeros([2 if d is None else d for d in shape], dtype=dtype, device=qmodel.device))
        dynamic.append({axis: batch for axis, d in enumerate(shape) if d is None})
    with torch.no_grad():
        return torch.export.export(module, tuple(given), dynamic_shapes=tuple(dynamic), strict=False)


def write_pt2(program: torch.export.ExportedProgram, record: Mapping[str, str], path: Path) -> Path:
    """Write the file. Raises StorageError where it cannot be written."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={RECORD: json.dumps(dict(record))})
    return write_whole(path, buffer.getvalue())


def open_program(path: Path) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """The program of a file of ours, and what the file says of itself. Raises BadWeightsError for one of another tool,
    of which nothing is unpickled, a damaged one, and one with other objects than tensors."""
    import torch.ao.quantization.fx._decomposed

    record: dict[str, Any] = {RECORD: ""}
    try:
        with zipfile.ZipFile(path) as parts:
            ours = any(name.endswith(f"/{RECORD}") for name in parts.namelist())
            if ours:
                _check_plain(parts)
        with _quiet():
            program = torch.export.load(path, extra_files=record) if ours else None
        said = json.loads(record[RECORD] or "{}")
        if ours and not all(isinstance(json.loads(said[name]), list) for name in ("inputs", "outputs")):
            raise ValueError("it does not say what goes in and comes out")
    except DAMAGED as error:
        raise refused(path, "PyTorch", error) from error
    if program is None:
        raise BadWeightsError(
            f"{path} was not written by `quantlens export` (or by an earlier release); in Python give "
            "torch.export.load(…).module() in its place"
        )
    return program, said


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the traceback that torch logs of a file that it cannot read."""
    logger = logging.getLogger("torch.export")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def open_pt2(path: Path, threads: int | None) -> Opened:
    """A file of ours, in PyTorch on the CPU. Raises BadWeightsError as :func:`open_program` does."""
    program, record = open_program(path)
    module, inputs, names = program.module(), json.loads(record["inputs"]), json.loads(record["outputs"])

    def run(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = [torch.from_numpy(np.ascontiguousarray(values[name])) for name in inputs]
        with isolation(), torch.inference_mode():
            if threads is not None:
                torch.set_num_threads(threads)
            found = module(*given)
        found = found if isinstance(found, tuple | list | dict) else [found]
        parts = list(found.values()) if isinstance(found, dict) else [pooled(found[0]), *found[1:]]
        return {name: value.numpy() for name, value in zip(names, parts, strict=True)}

    shapes = [tuple(node.meta["val"].shape) for node in program.graph_module.graph.output_node().args[0]]
    outputs = [
        Port(name, tuple(size if isinstance(size, int) else None for size in shape), "float32")
        for name, shape in zip(names, shapes, strict=True)
    ]
    ports = [Port(name, None, "float32") for name in inputs]
    version = torch.__version__.split("+")[0]
    return Opened(run, ports, outputs, record, f"torch {version}", (RuntimeError,), integers=AS_FLOAT)


def _check_plain(parts: zipfile.ZipFile) -> None:
    """Raises UnpicklingError for a file with other objects than tensors, which `torch.export.load` would unpickle: we
    write none."""
    for name in parts.namelist():
        if name.endswith(".pt"):
            torch.load(io.BytesIO(parts.read(name)), weights_only=True)
        config = json.loads(parts.read(name)).get("config", {}) if name.endswith("_config.json") else {}
        if "_obj_" in name or any(one.get("use_pickle") or "_obj_" in one["path_name"] for one in config.values()):
            raise pickle.UnpicklingError(f"{name} holds other objects than tensors")


def _standard(qmodel: QuantizedModel, simulate: bool, gaussians: Gaussians | None) -> nn.Module:
    """The simulation, of which the outputs of the module are given (one, or a tuple), with the standard operators in
    the place of the quantizers that they can be."""
    quantizers: dict[str, Any] = dict(qmodel.plan.quantizers)
    if qmodel.plan.operators:
        raise UnsupportedError("integer LayerNorm and softmax have no standard operators; quantize with --target")
    for key, quantizer in quantizers.items():
        if is_integer(quantizer, STANDARD):
            quantizers[key] = _Standard(quantizer)
        elif not simulate:
            raise UnsupportedError(
                f"{key} has the format {quantizer.kind!r} with {quantizer.bits} bits, which PyTorch's quantize "
                "operators do not know; quantize with --target, or export with --simulate"
            )
    module = simulation(qmodel.graph, quantizers, whole=True)
    weights = {f"quantized_weights.{edge.key.replace('.', '_')}": edge for edge, _ in qmodel.weight_edges()}
    for node in [n for n in module.graph.nodes if n.op == "get_attr" and n.target in weights]:
        edge = weights[node.target]
        if isinstance(quantizers[edge.key], _Standard):
            quantizer = qmodel.plan.quantizers[edge.key]
            module.add_submodule(f"codes.{edge.key}", _Standard(quantizer, qmodel.graph.tensor(edge.value.target)))
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.call_module(f"codes.{edge.key}"))
            module.graph.erase_node(node)
    output = next(node for node in module.graph.nodes if node.op == "output")
    _, features, outputs = output.args[0]
    if qmodel.task == "detect":
        outputs = _detections(module.graph, output, qmodel, outputs)
    elif gaussians is not None:
        with module.graph.inserting_before(output):
            outputs = (*outputs, add_score(module.graph, module, features, gaussians))
    output.args = (outputs[0] if len(outputs) == 1 else outputs,)
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return fx.GraphModule(module, module.graph)


def _detections(graph: fx.Graph, output: fx.Node, qmodel: QuantizedModel, outputs: Any) -> dict[str, fx.Node]:
    """What the file of a detector gives, as :func:`quantlens.export.detectors.write_detections` has it."""
    logits, boxes = (outputs[place] for place in measured_outputs(qmodel))
    aten = torch.ops.aten
    with graph.inserting_before(output):
        if qmodel.detection_head.scoring == "softmax":  # without "no object", the last
            shares = graph.call_function(aten.softmax.int, (logits, -1))
            scores = graph.call_function(aten.slice.Tensor, (shares, -1, 0, -1))
        else:
            scores = graph.call_function(aten.sigmoid.default, (logits,))
    return {"logits": logits, "boxes": boxes, "scores": scores}


class _Standard(nn.Module):
    """A uniform quantizer as PyTorch's operators. weight: what it is for, kept as codes; None for an activation."""

    def __init__(self, quantizer: Uniform, weight: Tensor | None = None):
        super().__init__()
        operators, self.axis = torch.ops.quantized_decomposed, quantizer.axis
        self.register_buffer("codes", None if weight is None else quantizer.encode(weight))
        if self.axis is None:
            self.quantize, self.dequantize = operators.quantize_per_tensor, operators.dequantize_per_tensor
            self.scale, self.zero = float(quantizer.scale), int(quantizer.zero_point)
        else:
            self.quantize, self.dequantize = operators.quantize_per_channel, operators.dequantize_per_channel
            self.register_buffer("scale", quantizer.scale)
            self.register_buffer("zero", quantizer.zero_point)
        self.codes_are = (quantizer.qmin, quantizer.qmax, quantizer.code_dtype)

    def forward(self, x: Tensor | None = None) -> Tensor:
        axis = () if self.axis is None else (self.axis,)
        how = (self.scale, self.zero, *axis, *self.codes_are)
        return self.dequantize(self.quantize(x, *how) if self.codes is None else self.codes, *how)
