"""A quantized model as a .pt2 file: ``torch.export`` with PyTorch's own quantize and dequantize operators, loadable
without quantlens:

    import torch, torch.ao.quantization.fx._decomposed       # registers the operators
    model = torch.export.load("model.pt2").module()
    logits = model(images)

Weights are stored as their integer codes (8 bits each, also where the codes are narrower). Formats that the standard
operators do not know become float operations of the same values.
"""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlens.errors import UnsupportedError
from quantlens.export.onnx_graph import is_integer
from quantlens.files import write_whole
from quantlens.formats import Uniform
from quantlens.qmodel import QuantizedModel
from quantlens.qmodel.simulation import simulate as simulation

STANDARD = frozenset((bits, signed) for bits in range(1, 9) for signed in (True, False))
"""Widths and signs of codes that the operators know."""


def export_pt2(qmodel: QuantizedModel, path: Path, *, simulate: bool) -> Path:
    """Write a .pt2 file. simulate: allow formats without standard operators, as float operations.

    Raises UnsupportedError for such formats otherwise, StorageError where the file cannot be written.
    """
    import torch.ao.quantization.fx._decomposed

    module = _standard(qmodel, simulate)
    batch = torch.export.Dim("batch", min=1, max=4096)
    given, dynamic = [], []
    for node in qmodel.graph.inputs:
        shape, dtype = node.meta["shape"], node.meta.get("dtype") or torch.float32
        given.append(torch.zeros([2 if d is None else d for d in shape], dtype=dtype, device=qmodel.device))
        dynamic.append({axis: batch for axis, d in enumerate(shape) if d is None})
    with torch.no_grad():
        program = torch.export.export(module, tuple(given), dynamic_shapes=tuple(dynamic), strict=False)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return write_whole(path, buffer.getvalue())


def _standard(qmodel: QuantizedModel, simulate: bool) -> nn.Module:
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
    outputs = output.args[0][2]
    output.args = (outputs[0] if len(outputs) == 1 else outputs,)
    return fx.GraphModule(module, module.graph)


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
