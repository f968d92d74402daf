"""Nothing that a method or a caller writes into what they are given changes the model for later calls."""

from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.calibration import Calibration, CalibrationPass
from quantlens.graph import graph_of
from quantlens.methods.base import MATMUL_OPERANDS, Method, MethodInfo, matmul_operand_edges
from quantlens.qmodel import Plan


def _tensors(graph):
    for name in graph.tensors():
        graph.tensor(name).mul_(2)


def _root(graph):
    for tensor in (*graph.root.parameters(), *graph.root.buffers()):
        tensor.mul_(2)


def _module(graph):
    for tensor in (*graph.parameters(), *graph.buffers(), *graph.module().buffers()):
        tensor.add_(1)


def _nodes(graph):
    for node in graph.fx.nodes:
        node.meta.clear()
        if node.op == "get_attr":
            node.target = next(iter(graph.tensors()))


VANDALS = {"tensors": _tensors, "root": _root, "module": _module, "nodes": _nodes}


class Vandal(Method):
    """Writes into all that a method is given."""

    info = MethodInfo("vandal", "", "", "", 2025, "", MATMUL_OPERANDS, "")

    def __init__(self, harm):
        self.harm = harm

    def build(self, graph, calibration, bits, run):
        def decide(edge, look):
            seen = look(sample=False)
            for tensor in (seen.low, seen.high, seen.lower, seen.upper, *look.tensors()):
                tensor.mul_(2)

        edges = matmul_operand_edges(graph)
        CalibrationPass(graph, calibration, sequential=False, seen=run.seen).run(edges, decide)
        for chunk in calibration:
            chunk.zero_()
        original, shared = graph.clone(), graph.clone(share=True)
        self.harm(shared)
        self.harm(graph)
        assert not torch.equal(original.tensor("head.weight"), graph.tensor("head.weight")) or self.harm is _nodes
        graph.fx, graph.root = original.fx, original.root
        return Plan()


@pytest.fixture
def model(fresh):
    return fresh("deit3")


def everything(model, pictures) -> list[torch.Tensor]:
    images = pictures.clone()
    made = [ql.quantize(model, images, method="minmax")(pictures)]
    made.append(ql.quantize(model, images, method="minmax", bits="W4A4")(pictures))
    made.append(ql.quantize(model, images, bits="FP32")(pictures))
    return [*made, model(pictures), graph_of(model)(pictures)]


@pytest.mark.parametrize("harm", VANDALS)
def test_a_method_that_writes_in_place_changes_nothing_for_later_calls(model, pictures, harm):
    before, images = everything(model, pictures), pictures.clone()
    Vandal(VANDALS[harm]).apply(model, images, "W8A8")
    assert torch.equal(images, pictures), "the calibration images were changed"
    for old, new in zip(before, everything(model, pictures), strict=True):
        assert torch.equal(old, new)
    assert torch.equal(before[2], before[4]), "FP32 is the model"


@pytest.mark.parametrize("harm", ["tensors", "root", "module", "nodes"])
@pytest.mark.parametrize("bits", ["FP32", "W8A8"])
def test_a_quantized_model_is_the_callers_own(model, pictures, bits, harm):
    before = everything(model, pictures)
    qmodel = ql.quantize(model, pictures, method="minmax", bits=bits)
    qmodel.plan.info.clear()
    with torch.no_grad():
        for tensor in (*qmodel.parameters(), *qmodel.buffers(), *qmodel.simulation().buffers()):
            tensor.mul_(2)
    VANDALS[harm](qmodel.graph)
    qmodel.plan.quantizers.clear()
    for old, new in zip(before, everything(model, pictures), strict=True):
        assert torch.equal(old, new)
    assert ql.quantize(model, pictures, bits="FP32").plan.info["method"] == "fp32"


def test_a_copy_of_a_quantized_model_is_a_copy(model, pictures):
    import copy

    qmodel = ql.quantize(model, pictures, method="minmax")
    before, twin = qmodel(pictures), copy.deepcopy(qmodel)
    _tensors(twin.graph)
    qmodel._simulation[0] = None
    assert torch.equal(qmodel(pictures), before)


def test_graphs_that_share_hold_no_second_copy(model):
    graph = graph_of(model)
    for name, tensor in graph.clone(share=True).tensors().items():
        assert tensor.data_ptr() == graph.tensor(name).data_ptr()
    for name, tensor in graph.clone().tensors().items():
        assert tensor.data_ptr() != graph.tensor(name).data_ptr()
        assert torch.equal(tensor, graph.tensor(name))


def test_a_callers_inference_mode_leaves_tensors_that_can_be_trained(model, pictures):
    with torch.inference_mode():
        qmodel = ql.quantize(model, pictures, method="minmax")
    assert not any(t.is_inference() for t in qmodel.graph.tensors().values())


@pytest.mark.parametrize("name", ["minmax", "repq-vit", "fq-ptq", "quantlens-fast"])
def test_the_methods_leave_the_images_alone(model, pictures, name):
    images = pictures.clone()
    ql.quantize(model, images, method=name, bits="W6A6")
    assert torch.equal(images, pictures)
    chunk = Calibration.of(images, model.preprocess).chunk(0)
    assert chunk.data_ptr() != images.data_ptr()
