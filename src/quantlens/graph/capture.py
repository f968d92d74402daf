"""Model -> :class:`~quantlens.graph.graph.Graph`, through ``torch.export`` with a dynamic batch, attention opened.

``torch.export`` gives ATen operations that remember the module they came from; functionalisation without
decomposition keeps ``linear``, ``layer_norm`` and ``scaled_dot_product_attention`` whole and removes in-place writes
and dropout. What is left to do
here: name the parameters, fold what does not depend on the images (Swin's relative position bias) and BatchNorm, open
fused attention into q·kᵀ, scale, mask, softmax and ·v, and bring equivalent spellings to one.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlens.ambient import isolated
from quantlens.errors import CaptureError, QuantlensWarning, first_line
from quantlens.graph.attention import open_attention
from quantlens.graph.constants import fold_constants, refuse_random_numbers
from quantlens.graph.exporting import Call, arguments_of, one_batch_size
from quantlens.graph.graph import Graph, op_name, put_tensor, replace_argument
from quantlens.graph.norms import fold_batch_norm
from quantlens.graph.reuse import captured
from quantlens.models import unwrapped

aten = torch.ops.aten

SPELLINGS = {
    "aten.view.default": aten.reshape.default,
    "aten._unsafe_view.default": aten.reshape.default,
    "aten.bmm.default": aten.matmul.default,
    "aten.mm.default": aten.matmul.default,
}
IDENTITIES = {
    "aten.dropout.default",
    "aten.feature_dropout.default",
    "aten.alias.default",
    "aten.detach.default",
    "aten.detach_.default",
    "aten.lift_fresh_copy.default",
    "aten.contiguous.default",
    "aten.clone.default",
}
CASTS = {"aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout"}
AUTOCAST = {torch.float32, torch.float16, torch.bfloat16}
"""Types between which autocast converts; a graph of float32 computes in float32 throughout."""

EFFECTS = ("aten._assert", "aten.sym_constrain", "aten._check", "profiler.")


@isolated
def capture(model: nn.Module, inputs: Any, *, share: bool = False) -> Graph:
    """Capture ``model`` in evaluation mode.

    inputs: an example of what it takes: images [B, 3, H, W] float, or (arguments, keyword arguments). The sizes of its
    tensors are fixed, the batch is not (B = 1 is repeated to 2); whatever is no tensor is a constant.
    Raises CaptureError when ``torch.export`` cannot trace the model, or what it returns is not understood.
    The model itself is left as it was; the graph holds copies of its tensors (``share``: the tensors themselves, at no
    memory, for a graph that is only read).
    """
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a module of TorchScript cannot be captured: give the Python module that it was made of")
    call = Call(model, *arguments_of(inputs))
    try:
        program = call.exported()
    except Exception as error:
        reason = first_line(error)
        if one_batch_size(error):
            reason = "it works for one batch size only; does it go through the images one by one?"
        elif "data-dependent" in reason:
            reason = "what it computes depends on values (.item(), bool(…), an if); say it in tensors, as torch.where"
        raise CaptureError(
            f"{type(model).__name__} cannot be captured by torch.export: {reason} "
            "(the model must take images [B, 3, H, W], or what else the example holds, and work for any batch size)"
        ) from error
    call.gives()
    root, nodes, shapes = _flatten(program, share, call.names, call.image)
    graph = Graph(root, nodes, call.structure(shapes))
    _normalise(graph)
    fold_constants(graph)
    fold_batch_norm(graph)
    open_attention(graph)
    _matmul_by_constant_to_linear(graph)
    graph.fx.eliminate_dead_code()
    refuse_random_numbers(graph)
    graph.fx.lint()
    graph.eval()
    if not call.same_alone(graph):
        warnings.warn(_ALONE.format(name=type(model).__name__), QuantlensWarning, stacklevel=2)
    return graph


def graph_of(model: Any) -> Graph:
    """The graph of a :class:`quantlens.models.Model`, captured at its first use and kept on the model: to
    be read, since it holds the model's own tensors; who wants to change it takes a
    :meth:`~quantlens.graph.graph.Graph.clone`."""
    if "graph" not in model.derived:
        size = model.preprocess.input_size
        images = torch.zeros(2, *size, device=model.device)
        inputs = getattr(model, "example", None) or images  # how the model is called, where an image is not all
        source = getattr(model, "source", None)  # its name, or a reference to the person's module that it is a copy of
        owner = source() if callable(source) else source

        def make() -> Graph:
            return capture(model.module, inputs, share=True)

        model.derived["graph"] = captured(owner, model.module, inputs, make)
    return model.derived["graph"]


_ALONE = (
    "{name} computes something else for a single image than for several (does it ask for the batch size?): what it "
    "does with several was captured; give it two images at least"
)


def _flatten(
    program: Any, share: bool, names: Mapping[int, str], image: int
) -> tuple[nn.Module, fx.Graph, dict[int, Sequence[Any]]]:
    """The exported program as one graph, whose parameters are ``get_attr`` nodes under their ``state_dict`` names, with
    the module that holds them and the shapes of its outputs."""
    signature = program.graph_signature
    constants = signature.inputs_to_lifted_tensor_constants
    held_by = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **constants}
    tensors = {**program.constants, **program.state_dict}
    root, graph = nn.Module(), fx.Graph()
    mapping: dict[fx.Node, Any] = {}
    given = [node for node in program.graph.nodes if node.op == "placeholder" and node.name not in held_by]
    batch = given[image].meta["val"].shape[0].node.expr
    half = any(t.dtype in (torch.float16, torch.bfloat16) for t in program.state_dict.values())
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in held_by:
            held = tensors[held_by[node.name]].detach()
            held = held.contiguous() if share else held.clone(memory_format=torch.contiguous_format)
            name = _plain(f"{'_lifted.' if node.name in constants else ''}{held_by[node.name]}")
            put_tensor(root, name, held)
            new = graph.get_attr(name)
        elif node.op == "placeholder":
            number = given.index(node)
            new = graph.placeholder("images" if number == image else re.sub(r"\W", "_", names[number]))
        elif node.op == "output":
            found = _outputs(node, signature)
            graph.output(mapping[found[0]] if len(found) == 1 else tuple(mapping[n] for n in found))
            return root, graph, {n: tuple(o.meta["val"].shape) for n, o in enumerate(found)}
        elif op_name(node) in CASTS and _casts_nothing(node, half):
            mapping[node] = mapping[node.args[0]]
            continue
        elif node.op == "call_function":
            new = graph.node_copy(node, lambda n: mapping[n])
        else:
            raise CaptureError(f"the model uses {node.op} {node.target!r}, which cannot be flattened into one graph")
        new.meta = _meta(node, value)
        new.meta["is_batch"] = isinstance(value, torch.SymInt) and value.node.expr == batch
        mapping[node] = new
    raise CaptureError("the exported program has no output")


def _outputs(output: fx.Node, signature: Any) -> list[fx.Node]:
    """The nodes of what the model returns (not of buffers that it writes), in order."""
    specs = zip(output.args[0], signature.output_specs, strict=True)  # type: ignore[arg-type]
    return [node for node, spec in specs if spec.kind.name == "USER_OUTPUT"]  # type: ignore[misc]


def _casts_nothing(node: fx.Node, half: bool) -> bool:
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    same = before.dtype == after.dtype or (not half and {before.dtype, after.dtype} <= AUTOCAST)
    return same and before.device == after.device


def _meta(node: fx.Node, value: Any) -> dict[str, Any]:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    shape = tuple(int(d) if isinstance(d, int) else None for d in value.shape) if isinstance(value, Tensor) else None
    symbolic = isinstance(value, torch.SymInt | int)
    kind = value.dtype if isinstance(value, Tensor) else None
    return {"module": _plain(path.split("@")[0]), "shape": shape, "symbolic": symbolic, "dtype": kind}


def _plain(name: str) -> str:
    """The name of a tensor or module in the model as a person sees it: without what :class:`Call` and
    ``torch.compile`` put around it."""
    return re.sub(r"(^|\.)_orig_mod(?=\.|$)", "", re.sub(r"^(_lifted\.)?model(\.|$)", r"\1", name)).removeprefix(".")


def _normalise(graph: Graph) -> None:
    """One spelling for each operation; identities and assertions gone; one node for the batch size."""
    for node in list(graph.fx.nodes):
        if node.op != "call_function":
            continue
        name = op_name(node)
        if name.startswith(EFFECTS):
            graph.fx.erase_node(node)
        elif name in IDENTITIES or (name == "aten.pad.default" and not any(node.args[1])):
            node.replace_all_uses_with(node.args[0])
            graph.fx.erase_node(node)
        elif name == "aten.addmm.default" and not node.kwargs:
            bias, *factors = node.args
            product = graph.insert(node, aten.matmul.default, tuple(factors), node.meta["shape"])
            node.target, node.args = aten.add.Tensor, (product, bias)
        elif name == "aten._softmax.default":
            node.target, node.args = aten.softmax.int, node.args[:2]
        elif name in SPELLINGS:
            node.target = SPELLINGS[name]
    sizes = [node for node in graph.fx.nodes if node.meta.get("is_batch")]
    if sizes:
        batch = graph.insert(graph.input.next, aten.sym_size.int, (graph.input, 0), ())
        batch.meta = {"module": "", "shape": None, "symbolic": True, "is_batch": True}
    for node in sizes:
        node.replace_all_uses_with(batch)
        graph.fx.erase_node(node)


def _matmul_by_constant_to_linear(graph: Graph) -> None:
    """``x @ W`` with a parameter W [in, out] is a linear layer with weight Wᵀ; a constant added to it is its bias."""
    for node in graph.fx.find_nodes(op="call_function", target=aten.matmul.default):
        weight = graph.constant(node.args[1])
        if weight is None or weight.dim() != 2:
            continue
        name = str(node.args[1].target)  # type: ignore[union-attr]
        stem = name.removesuffix("_folded").removesuffix(".weight")
        held = dict(graph.root.named_buffers())
        taken = f"{stem}.weight" in held or stem in held
        new = graph.insert_tensor(node, f"{name}_t" if taken else f"{stem}.weight", weight.t().contiguous())
        node.target, node.args = aten.linear.default, (node.args[0], new)
        users = list(node.users)
        if len(users) == 1 and op_name(users[0]) == "aten.add.Tensor" and not users[0].kwargs:
            other = [a for a in users[0].args if a is not node]
            bias = graph.constant(other[0]) if other else None
            if bias is not None and tuple(bias.shape) == (weight.shape[1],):
                replace_argument(node, "bias", other[0])
                node.prepend(other[0])  # the bias must be defined before the linear that uses it
                users[0].replace_all_uses_with(node)
                graph.fx.erase_node(users[0])
