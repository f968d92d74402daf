"""A fully quantized model has no float matmul, sum, LayerNorm, softmax or GELU input: the graph that is run proves it.

Every value of the simulation's graph is put into one class:

constant   does not depend on the pixels
quantized  comes out of a quantizer or an integer operator, and was at most moved, put together with other quantized
           values or constants, or multiplied by one number since
shifted    a quantized value plus constants (what an accumulator holds: position embedding, attention bias and mask)
float      everything else
"""

from __future__ import annotations

import pytest
import torch
from torch import fx

import quantlens as ql
from quantlens.graph.graph import VIEWS, op_name
from quantlens.graph.sites import ADDS, CONVS, SCALINGS
from quantlens.methods import registry
from quantlens.methods.base import EVERYTHING
from quantlens.qmodel import simulate

METHODS = sorted(name for name, info in registry.available().items() if info.quantizes == EVERYTHING)
OPERANDS = {
    **dict.fromkeys(("aten.linear.default", "aten.matmul.default", *CONVS), 2),
    **dict.fromkeys(("aten.layer_norm.default", "aten.softmax.int", "aten.gelu.default", "aten.mean.dim"), 1),
}
MOVES = VIEWS | {"aten.cat.default", "aten.index_select.default"}


def float_inputs(module: fx.GraphModule) -> list[str]:
    """What a fully quantized model must not have, as "operation reads value"; empty if it has none of it."""
    kinds: dict[fx.Node, str] = {}
    wrong: list[str] = []

    def reads(node: fx.Node, value: object, allowed: tuple[str, ...]) -> None:
        if isinstance(value, fx.Node) and kinds[value] not in allowed:
            wrong.append(f"{node.name} ({op_name(node)}) reads {value.name}, {kinds[value]}")

    for node in module.graph.nodes:
        sources = [kinds[s] for s in node.all_input_nodes]
        op = op_name(node)
        if node.op == "placeholder":
            kinds[node] = "float"
        elif node.op == "get_attr":
            kinds[node] = "constant"
        elif node.op == "call_module":
            kinds[node] = "quantized"
            if str(node.target).startswith("operators."):
                reads(node, node.args[0], ("quantized",))
        elif op.startswith("aten.sym_size") or set(sources) <= {"constant"}:
            kinds[node] = "constant"
        elif op in MOVES or (op in SCALINGS and not isinstance(node.args[1], fx.Node)):
            found = {k for k in sources if k != "constant"}
            kinds[node] = found.pop() if len(found) == 1 else "float"
        elif op in ADDS:
            if "constant" in sources:
                for value in node.all_input_nodes:
                    reads(node, value, ("constant", "quantized", "shifted"))
                kinds[node] = "float" if "float" in sources else "shifted"
            else:
                for value in node.all_input_nodes:
                    reads(node, value, ("quantized",))
                kinds[node] = "float"
        elif op in OPERANDS:
            for value in node.args[: OPERANDS[op]]:
                reads(node, value, ("quantized", "constant"))
            weight = node.args[1] if op == "aten.linear.default" or op in CONVS else None
            if isinstance(weight, fx.Node) and not str(weight.target).startswith("quantized_weights."):
                wrong.append(f"{node.name} ({op}) has a float weight")
            kinds[node] = "float"
        elif node.op == "output":
            logits = node.args[0][0]
            # two heads that are averaged: each is quantized
            while kinds[logits] == "float" and op_name(logits) in SCALINGS:
                logits = logits.args[0]
            ends = logits.args[:2] if op_name(logits) in ADDS else (logits,)
            for value in ends:
                reads(node, value, ("quantized",))
        else:
            kinds[node] = "float"
    return wrong


@pytest.fixture(scope="module")
def quantized(loaded, pictures):
    """(method, architecture) -> model, made once."""
    made: dict[tuple[str, str], ql.QuantizedModel] = {}

    def make(method: str, kind: str):
        if (method, kind) not in made:
            made[method, kind] = ql.quantize(loaded[kind], pictures[:4], method=method, bits="W8A8")
        return made[method, kind]

    return make


def test_there_are_such_methods():
    assert "fq-ptq" in METHODS


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_in_float(method, architecture, quantized):
    assert float_inputs(quantized(method, architecture).simulation()) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_a_plan_that_lacks_one_quantizer_is_found_out(method, kind, quantized):
    qmodel = quantized(method, kind)
    plan = qmodel.plan
    skipped = 0
    for key in list(plan.quantizers)[:: 1 if kind == "vit" else 4]:
        rest = {k: q for k, q in plan.quantizers.items() if k != key}
        assert float_inputs(simulate(qmodel.graph, rest, plan.operators)), key
    for name in plan.operators:
        rest = {k: o for k, o in plan.operators.items() if k != name}
        skipped += not float_inputs(simulate(qmodel.graph, plan.quantizers, rest))
    assert skipped == 0, "an operator's site has no quantizer on its output"


def test_a_method_that_quantizes_operands_only_is_found_out(loaded, pictures):
    qmodel = ql.quantize(loaded["vit"], pictures, method="repq-vit", bits="W8A8")
    wrong = " ".join(float_inputs(qmodel.simulation()))
    for operation in ("layer_norm", "softmax", "gelu", "add"):
        assert operation in wrong


@pytest.mark.parametrize("method", METHODS)
def test_every_value_has_no_more_levels_than_its_bits(method, quantized, pictures):
    """What crosses an edge in the running model are integers times scales, as many as the bits allow."""
    qmodel = quantized(method, "vit")
    counts: dict[str, tuple[int, int]] = {}

    class Recorder(fx.Interpreter):
        def call_module(self, target, args, kwargs):
            value = super().call_module(target, args, kwargs)
            module = self.module.get_submodule(target)
            form = getattr(module, "output", module)
            counts[target] = (len(form.encode(value).unique()), 2**form.bits)
            assert torch.equal(form(value), value), target
            return value

    Recorder(qmodel.simulation()).run(pictures)
    assert len(counts) > 20
    assert all(levels <= most for levels, most in counts.values())
