"""A quantized model as a .pt2 file: ``torch.export`` with PyTorch's own quantize and dequantize operators, loadable
without quantlens:

    import torch, torch.ao.quantization.fx._decomposed       # registers the operators
    model = torch.export.load("model.pt2").module()
    logits = model(images)

Weights are stored as their integer codes (8 bits each, also where the codes are narrower). Formats that the standard
operators do not know become float operations of the same values.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlens.errors import UnsupportedError
from quantlens.files import write_whole
from quantlens.formats import Quantizer, Uniform
from quantlens.graph.graph import put_tensor, replace_argument, tensor_tree
from quantlens.qmodel import QuantizedModel


def export_pt2(qmodel: QuantizedModel, path: Path, *, simulate: bool) -> Path:
    """Write a .pt2 file. simulate: allow formats without standard operators, as float operations.

    Raises UnsupportedError for such formats otherwise, StorageError where the file cannot be written.
    """
    import torch.ao.quantization.fx._decomposed

    module = _standard(qmodel, simulate)
    batch = torch.export.Dim("batch", min=1, max=4096)
    size = qmodel.preprocess.input_size
    with torch.no_grad():
        program = torch.export.export(module, (torch.zeros(2, *size),), dynamic_shapes=({0: batch},), strict=False)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write_whole(path, buffer.getvalue())
    return path


def _standard(qmodel: QuantizedModel, simulate: bool) -> nn.Module:
    """The graph as a module that gives logits, with the standard operators on its edges."""
    graph = qmodel.graph.clone(share=True)
    if qmodel.plan.operators and not simulate:
        raise UnsupportedError("integer LayerNorm and softmax have no standard operators; export with --simulate")
    if qmodel.plan.operators:
        return _Logits(copy.deepcopy(qmodel).simulation())
    root = tensor_tree(graph.tensors())
    edges = graph.sites.edges
    for number, (key, quantizer) in enumerate(qmodel.plan.quantizers.items()):
        edge = edges[key]
        if not _is_standard(quantizer) and not simulate:
            raise UnsupportedError(
                f"{key} has the format {quantizer.kind!r} with {quantizer.bits} bits, which PyTorch's quantize "
                "operators do not know; quantize with --target, or export with --simulate"
            )
        if edge.is_weight:
            value = _weight(graph.fx, root, edge, quantizer, graph.tensor(str(edge.value.target)), f"q{number}")
            replace_argument(edge.node, edge.position, value)
        elif edge.position is not None:
            with graph.fx.inserting_before(edge.node):
                value = _activation(graph.fx, root, quantizer, edge.value, f"q{number}")
            replace_argument(edge.node, edge.position, value)
        else:
            users = list(edge.node.users)
            with graph.fx.inserting_after(edge.node):
                value = _activation(graph.fx, root, quantizer, edge.node, f"q{number}")
            for user in users:
                user.replace_input_with(edge.node, value)
    for node in reversed(list(graph.fx.nodes)):
        if not node.users and node.op == "get_attr":
            graph.fx.erase_node(node)
    return fx.GraphModule(root, graph.fx).eval()


class _Logits(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images)[0]


def _is_standard(quantizer: Quantizer) -> bool:
    """Uniform, at most 8 bits, zero points that are codes."""
    if type(quantizer) is not Uniform or quantizer.bits > 8:
        return False
    zero = quantizer.zero_point
    return bool(((zero >= quantizer.qmin) & (zero <= quantizer.qmax)).all())


def _weight(graph: fx.Graph, root: nn.Module, edge: Any, quantizer: Quantizer, weight: Tensor, name: str) -> fx.Node:
    with torch.no_grad():
        if not _is_standard(quantizer):
            put_tensor(root, f"{name}_value", quantizer(weight))
            with graph.inserting_before(edge.node):
                return graph.get_attr(f"{name}_value")
        codes = quantizer.encode(weight)
    put_tensor(root, f"{name}_codes", codes)
    with graph.inserting_before(edge.node):
        return _dequantized(graph, root, quantizer, graph.get_attr(f"{name}_codes"), codes.dtype, name)


def _activation(graph: fx.Graph, root: nn.Module, quantizer: Quantizer, source: fx.Node, name: str) -> fx.Node:
    """Nodes that quantize and dequantize ``source``, at the place where the graph inserts."""
    if not _is_standard(quantizer):
        root.add_module(f"{name}_simulated", quantizer)
        return graph.call_module(f"{name}_simulated", (source,))
    assert isinstance(quantizer, Uniform)
    operators = torch.ops.quantized_decomposed
    low, high, kind = quantizer.qmin, quantizer.qmax, quantizer.code_dtype
    if quantizer.axis is None:
        scale, zero = float(quantizer.scale), int(quantizer.zero_point)
        codes = graph.call_function(operators.quantize_per_tensor.default, (source, scale, zero, low, high, kind))
    else:
        scales, zeros = _parameters(graph, root, quantizer, name)
        codes = graph.call_function(
            operators.quantize_per_channel.default, (source, scales, zeros, quantizer.axis, low, high, kind)
        )
    with graph.inserting_after(codes):
        return _dequantized(graph, root, quantizer, codes, kind, f"{name}_back")


def _dequantized(
    graph: fx.Graph, root: nn.Module, quantizer: Quantizer, codes: fx.Node, kind: torch.dtype, name: str
) -> fx.Node:
    assert isinstance(quantizer, Uniform)
    operators = torch.ops.quantized_decomposed
    low, high = quantizer.qmin, quantizer.qmax
    if quantizer.axis is None:
        arguments = (codes, float(quantizer.scale), int(quantizer.zero_point), low, high, kind)
        return graph.call_function(operators.dequantize_per_tensor.default, arguments)
    with graph.inserting_before(codes):  # what is inserted after a node comes out in reverse
        scales, zeros = _parameters(graph, root, quantizer, name)
    return graph.call_function(
        operators.dequantize_per_channel.default, (codes, scales, zeros, quantizer.axis, low, high, kind)
    )


def _parameters(graph: fx.Graph, root: nn.Module, quantizer: Uniform, name: str) -> tuple[fx.Node, fx.Node]:
    put_tensor(root, f"{name}_scale", quantizer.scale)
    put_tensor(root, f"{name}_zero", quantizer.zero_point)
    return graph.get_attr(f"{name}_scale"), graph.get_attr(f"{name}_zero")
